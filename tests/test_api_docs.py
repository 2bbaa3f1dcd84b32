"""Every promised name is there, says what it is, and stands in docs/api.md as it is now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_api_docs.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_docs_are_what_the_docstrings_say(script: ModuleType) -> None:
    page = script.render(script.read_names(script.NAMES.read_text(encoding="utf-8")))
    assert script.PAGE.read_text(encoding="utf-8") == page, "docs/api.md is not up to date: run `make docs`"


def test_every_promised_name_is_on_the_page(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    for module, entries in script.read_names(script.NAMES.read_text(encoding="utf-8")).items():
        for entry in entries:
            name = f"MAGI_ATTENTION_{entry.name}" if module == script.ENVIRONMENT else entry.name
            assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ("[magi_attention.common]\nAttnRangers", "AttnRangers: the module has no such name"),
        ("[magi_attention.commons]\nAttnRange", "No module named 'magi_attention.commons'"),
        ("[magi_attention.common]\nAttnRange: start stop", "AttnRange.stop: the class has no such member"),
        ("[magi_attention.common]\nAttnRange: __matmul__", "AttnRange.__matmul__: the class has no such member"),
        ("[magi_attention.common]\nRangeError: __eq__", "RangeError.__eq__: the class does not define it"),
        ("[environment]\nSANITY_CHECKS", "sanity_checks: the module has no such name"),
    ],
)
def test_a_missing_name_is_an_error(script: ModuleType, names: str, complaint: str) -> None:
    with pytest.raises(script.MissingNameError) as error:
        script.render(script.read_names(names))
    assert complaint in str(error.value)


def test_a_name_without_docstring_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_silent.py").write_text(
        "def silent(): pass\n\n\nclass Quiet:\n    'Says so.'\n    def f(self): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(script.MissingNameError) as error:
        script.render(script.read_names("[planted_silent]\nsilent\nQuiet: f"))
    assert "planted_silent.silent: it has no docstring" in str(error.value)
    assert "planted_silent.Quiet.f: it has no docstring" in str(error.value)


def test_a_page_shows_signature_sections_and_drawings(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_spoken.py").write_text(
        'def spoken(a: int, *, b: float = 0.5, c=None) -> str:\n    """Says much.\n\n        a ──► b\n\n'
        "    Args:\n        a: of tokens,\n            two lines.\n        b, c: more.\n\n"
        '    Raises:\n        ValueError: never.\n    """\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    page = script.render(script.read_names("[planted_spoken]\nspoken"))
    expected = """\
## `planted_spoken`

### `spoken`

```python
spoken(a: int, *, b: float = 0.5, c=None) -> str
```

Says much.

    a ──► b

*Args:*

- `a`: of tokens,
  two lines.
- `b, c`: more.

*Raises:*

- `ValueError`: never.
"""
    assert page.endswith(expected), page
