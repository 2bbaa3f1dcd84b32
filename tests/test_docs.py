"""Every example of the pages gives what they say, and every command prints it."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from magi_attention.cli import main

DOCS = Path(__file__).parent.parent / "docs"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize(("name", "at_least"), [("masks.md", 25), ("planning.md", 15)])
def test_the_examples_of_the_page(name: str, at_least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"```console.*?```", "", text, flags=re.DOTALL).replace("```", "")
    examples = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert results.attempted > at_least
    assert results.failed == 0, "".join(said)


def commands_of(name: str) -> list[tuple[str, str]]:
    """Commands of the ``console`` blocks of a page, and what they are said to print."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"```console\n\$ magi-attention (.*?)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(("command", "said"), commands_of("planning.md"))
def test_the_commands_of_the_page(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    from magi_attention.mask import AttnMask

    suffix = AttnMask.from_slices([[64512, 65536]], [[0, 65536]], "causal")  # as the page writes it
    Path("suffix.json").write_text(suffix.to_json())
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert doctest.OutputChecker().check_output(said, printed, OPTIONS), printed


def test_the_page_has_commands() -> None:
    assert len(commands_of("planning.md")) == 5


def test_the_operators_of_the_page_exist() -> None:
    import torch

    import magi_attention.api  # noqa: F401 - makes the operators

    table = re.findall(
        r"^\| `\w+` \| `magi_attention::(\w+)` \| `(\w+)`",
        (DOCS / "modes.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(table) == 5
    for name in {one for row in table for one in row} | {"dispatch_sum"}:
        assert hasattr(torch.ops.magi_attention, name), name
