"""Imports point one way, one module reads the environment, and files stay small enough to be one idea."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "magi_attention"
SOURCE = ROOT / "src" / PACKAGE

# The story, told by the folders. A layer may import itself and those that it names.
LAYERS: dict[str, set[str]] = {
    "env": set(),
    "common": set(),
    "config": {"common"},
    "mask": {"common"},
    "plan": {"common", "mask", "config"},
    "comm": {"common", "mask", "plan", "env"},
    "kernels": {"common", "mask"},
    "functional": {"common", "mask", "plan", "comm", "kernels", "env"},
    "runtime": {"common", "mask", "plan", "comm", "kernels", "functional", "config", "env"},
    "api": {"common", "mask", "plan", "comm", "kernels", "functional", "runtime", "config", "env"},
    "testing": {"common", "mask", "plan", "comm", "kernels", "functional", "runtime", "config", "env"},
    # Names kept for programs already written.
    "dist_attn_runtime_mgr": {"common", "config", "runtime", "api"},
    "utils": {"env"},
    # The command line stands on everything.
    "__main__": {"cli"},
    "cli": {"common", "mask", "plan", "config", "runtime", "api", "testing", "viz"},
    "viz": {"common", "mask", "plan", "config"},
    # Its one import of a layer above is lazy: a name kept for programs already written.
    "__init__": {"env", "dist_attn_runtime_mgr"},
}

# What a layer may not import from outside, with all that lies under it.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "env": ("torch", "numpy"),
    "config": ("torch", "numpy"),
    "common": ("torch.distributed",),
    "mask": ("torch.distributed",),
    "plan": ("torch",),
    "kernels": ("torch.distributed",),
    "functional": ("torch.distributed",),
}

# Who may look at os.environ, and why. Only env.py reads variables that set something in the package.
READS_ENVIRONMENT = {
    "env.py": "it is the one that does",
    "kernels/cpu/build.py": "the system says there where its caches lie",
    "testing/dist.py": "hands the caller's environment to the ranks that it starts",
}

# Where plans are decided: whatever breaks ties by the processor's instruction set makes ranks on unlike hosts plan differently.
DECIDES = ("plan", "mask")
STABLE = {"sort", "argsort"}
NEVER = {"partition", "argpartition"}

MOST_LINES = 420
LONGER_FILES: dict[str, str] = {}


def module_of(path: Path, source: Path) -> str:
    """``magi_attention.plan.layout`` for ``plan/layout.py``; a folder's ``__init__.py`` is the folder."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)])


def layer_of(module: str) -> str:
    """The part behind the package's name: a folder, or a file beside the folders."""
    return [*module.split("."), "__init__"][1]


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of every import of a file, wherever it stands: lazy ones inside functions too.

    ``from a import b`` gives ``a`` and ``a.b``, for b may be a module.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def is_within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def import_violations(source: Path) -> list[str]:
    """One line for every import that points the wrong way, in the package that lies in the folder ``source``."""
    found = set()
    for path in sorted(source.rglob("*.py")):
        module = module_of(path, source)
        layer = layer_of(module)
        where = path.relative_to(source)
        if layer not in LAYERS:
            found.add(f"{where}: {layer!r} has no place among the layers; give it one in {Path(__file__).name}")
            continue
        for line, imported in imports_of(path, module):
            if is_within(imported, PACKAGE):
                target = layer_of(imported)
                # `from magi_attention import plan` names the package first; the package itself imports nothing.
                if imported != PACKAGE and target != layer and target in LAYERS and target not in LAYERS[layer]:
                    found.add(f"{where}:{line}: {layer} may not import {target}")
            for forbidden in FORBIDDEN.get(layer, ()):
                if is_within(imported, forbidden):
                    found.add(f"{where}:{line}: {layer} may not import {forbidden}")
    return sorted(found)


def environment_readers(source: Path) -> set[str]:
    """Files that name ``os.environ`` or ``os.getenv``."""
    readers = set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "putenv"):
                readers.add(str(path.relative_to(source)))
    return readers


def unstable_sorts(source: Path) -> list[str]:
    """One line for every sort in `DECIDES` that may break ties by the processor: ``lexsort`` and ``kind="stable"`` do not."""
    found = []
    for path in sorted(path for folder in DECIDES for path in (source / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            # A string's `partition` cuts it in three; and whoever sorts a list of Python's, sorts it stably.
            name, of_numpy = node.func.attr, ast.unparse(node.func.value) in ("np", "numpy")
            is_stable = any(word.arg == "kind" and ast.unparse(word.value) == "'stable'" for word in node.keywords)
            if name == "argpartition" or (name in NEVER and of_numpy) or (name in STABLE and not is_stable):
                found.append(f"{path.relative_to(source)}:{node.lineno}: {name} breaks ties by the processor")
    return found


def test_plans_sort_stably() -> None:
    assert unstable_sorts(SOURCE) == []


@pytest.mark.parametrize(
    "call",
    [
        "np.argsort(a)",
        "np.sort(a, axis=0)",
        "a.argsort()",
        "a.sort()",
        'np.argsort(a, kind="quicksort")',
        "np.argpartition(a, 3)",
        "a.argpartition(3)",
        "np.partition(a, 3)",
    ],
)
def test_a_planted_sort_is_caught(tmp_path: Path, call: str) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "swaps.py").write_text(f"import numpy as np\n\ndef f(a):\n    return {call}\n")
    assert len(unstable_sorts(tmp_path)) == 1


@pytest.mark.parametrize(
    "call", ['np.argsort(a, kind="stable")', "np.lexsort((a, a))", "sorted(a)", '"a.b".partition(".")']
)
def test_a_stable_sort_is_not_caught(tmp_path: Path, call: str) -> None:
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask" / "simplify.py").write_text(f"import numpy as np\n\ndef f(a):\n    return {call}\n")
    assert unstable_sorts(tmp_path) == []


def test_imports_point_one_way() -> None:
    assert import_violations(SOURCE) == []


def test_only_env_reads_the_environment() -> None:
    assert environment_readers(SOURCE) == set(READS_ENVIRONMENT)


def test_allowed_imports_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(LAYERS):
        ready = {layer for layer, below in LAYERS.items() if layer not in done and below <= done}
        assert ready, f"these layers import one another: {sorted(set(LAYERS) - done)}"
        done |= ready


def test_files_are_one_idea_each() -> None:
    lines = {
        str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
    }
    long = {name for name, count in lines.items() if count > MOST_LINES}
    assert long - set(LONGER_FILES) == set(), (
        f"over {MOST_LINES} lines is two ideas: split by idea, or say here why not"
    )
    assert set(LONGER_FILES) <= long, "no longer so long: strike it from the list"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("plan/layout.py", "import torch", "plan may not import torch"),
        ("plan/layout.py", "import torch.distributed as dist", "plan may not import torch"),
        ("plan/layout.py", "def f():\n    from torch import Tensor", "plan may not import torch"),
        ("plan/layout.py", "from magi_attention.comm import group_cast", "plan may not import comm"),
        ("plan/layout.py", "from .. import comm", "plan may not import comm"),
        ("mask/bands.py", "from ..plan.layout import ShardLayout", "mask may not import plan"),
        ("kernels/tiled.py", "from magi_attention import plan", "kernels may not import plan"),
        ("kernels/cpu/build.py", "import magi_attention.comm.group", "kernels may not import comm"),
        ("kernels/cpu/__init__.py", "from ... import comm", "kernels may not import comm"),
        (
            "comm/rows.py",
            "def f():\n    import importlib\n    importlib.import_module('magi_attention.kernels')",
            "kernels",
        ),
        ("functional/attn.py", "from torch import distributed", "functional may not import torch.distributed"),
        ("config.py", "from magi_attention.env import backend", "config may not import env"),
        ("__init__.py", "from magi_attention import api", "__init__ may not import api"),
        ("helpers/misc.py", "", "has no place among the layers"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text)
    violations = import_violations(tmp_path)
    assert len(violations) == 1, violations
    assert complaint in violations[0]


def test_a_downward_import_is_not_caught(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "layout.py").write_text(
        "import numpy\nfrom magi_attention.mask import AttnMask\nfrom . import demand"
    )
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "from os import getenv", "import os as o\no.getenv('A')"]
)
def test_a_planted_reader_of_the_environment_is_caught(tmp_path: Path, text: str) -> None:
    (tmp_path / "planted.py").write_text(text)
    assert environment_readers(tmp_path) == {"planted.py"}
