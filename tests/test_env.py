"""Every variable: its default, what it may be, and the message for what it may not be."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from magi_attention import env
from magi_attention.common.enum import MagiAttentionKernelBackend, MagiAttentionPrecision

PREFIX = "MAGI_ATTENTION_"

FLAGS: dict[str, Callable[[], bool | None]] = {
    "SANITY_CHECK": env.sanity_check,
    "SDPA_BACKEND": env.sdpa_backend,
    "DETERMINISTIC_MODE": env.deterministic_mode,
    "FORWARD_HIGH_PRECISION_REDUCE": env.forward_high_precision_reduce,
    "BACKWARD_HIGH_PRECISION_REDUCE": env.backward_high_precision_reduce,
    "QO_COMM": env.qo_comm,
    "HIERARCHICAL_COMM": env.hierarchical_comm,
}
# Name: (reader, default, least).
COUNTS: dict[str, tuple[Callable[[], int], int, int]] = {
    "DIST_ATTN_RUNTIME_DICT_SIZE": (env.dist_attn_runtime_dict_size, 1000, 1),
    "MIN_CHUNKS_PER_RANK": (env.min_chunks_per_rank, 8, 1),
    "FFA_FORWARD_SM_MARGIN": (env.ffa_forward_sm_margin, 0, 0),
    "FFA_BACKWARD_SM_MARGIN": (env.ffa_backward_sm_margin, 0, 0),
}


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env.VARIABLES:
        monkeypatch.delenv(PREFIX + name, raising=False)


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unset = None if name == "QO_COMM" else False  # which is decided by the mask where nobody says
    assert FLAGS[name]() is unset
    for value, expected in {"1": True, "0": False, "true": True, "False": False, "": unset, " 1 ": True}.items():
        monkeypatch.setenv(PREFIX + name, value)
        assert FLAGS[name]() is expected
        assert [other for other in FLAGS if FLAGS[other]()] == [name] * bool(expected)
    for value in ("2", "yes", "-1"):
        monkeypatch.setenv(PREFIX + name, value)
        with pytest.raises(ValueError, match=f"^{PREFIX}{name} must be 0 or 1, got '{value}'"):
            FLAGS[name]()


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, default, least = COUNTS[name]
    assert read() == default
    for value, expected in {"17": 17, str(least): least, "": default}.items():
        monkeypatch.setenv(PREFIX + name, value)
        assert read() == expected
    for value in (str(least - 1), "many", "1.5", "--5", "²"):
        monkeypatch.setenv(PREFIX + name, value)
        with pytest.raises(ValueError, match=f"^{PREFIX}{name} must be an int of at least {least}, got '{value}'"):
            read()


def test_dsink_all_reduce_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.dsink_all_reduce_op() == "none"
    for value in ("none", "sum", "avg", "SUM"):
        monkeypatch.setenv(f"{PREFIX}DSINK_ALL_REDUCE_OP", value)
        assert env.dsink_all_reduce_op() == value.lower()
    monkeypatch.setenv(f"{PREFIX}DSINK_ALL_REDUCE_OP", "max")
    with pytest.raises(ValueError, match=f"^{PREFIX}DSINK_ALL_REDUCE_OP must be one of none, sum, avg, got 'max'"):
        env.dsink_all_reduce_op()


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.backend() == "auto"
    monkeypatch.setenv(f"{PREFIX}BACKEND", "Reference")
    assert env.backend() == "reference"
    monkeypatch.setenv(f"{PREFIX}BACKEND", "")
    assert env.backend() == "auto"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"KERNEL_BACKEND": "ffa"}, "auto"),
        ({"KERNEL_BACKEND": "sdpa"}, "reference"),
        ({"KERNEL_BACKEND": "SDPA_OL"}, "tiled"),
        ({"KERNEL_BACKEND": ""}, "auto"),
        ({"SDPA_BACKEND": "1"}, "reference"),
        ({"SDPA_BACKEND": "1", "KERNEL_BACKEND": "sdpa_ol"}, "tiled"),
        ({"SDPA_BACKEND": "1", "KERNEL_BACKEND": "ffa"}, "auto"),
        ({"SDPA_BACKEND": "1", "BACKEND": "cpu"}, "cpu"),
        ({"KERNEL_BACKEND": "sdpa", "BACKEND": "tiled"}, "tiled"),
        ({"KERNEL_BACKEND": "sdpa", "BACKEND": "auto"}, "auto"),
        ({"KERNEL_BACKEND": "fa4", "BACKEND": "cpu"}, "cpu"),
    ],
)
def test_which_kernel_wins(settings: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(PREFIX + name, value)
    assert env.backend() == expected


def test_kernels_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}KERNEL_BACKEND", "fa4")
    with pytest.raises(ValueError, match="KERNEL_BACKEND is fa4, a kernel that is not in this package; set it to ffa"):
        env.backend()
    monkeypatch.setenv(f"{PREFIX}KERNEL_BACKEND", "cpu")
    with pytest.raises(ValueError, match="KERNEL_BACKEND must be one of ffa, sdpa, sdpa_ol, got 'cpu'"):
        env.backend()
    assert {one.value for one in MagiAttentionKernelBackend} == {"ffa", "sdpa", "sdpa_ol", "fa4"}


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.precision() is None
    for one in MagiAttentionPrecision:
        monkeypatch.setenv(f"{PREFIX}PRECISION", one.name)
        assert env.precision() == one.value
    monkeypatch.setenv(f"{PREFIX}PRECISION", "float32")
    with pytest.raises(ValueError, match="PRECISION must be one of bf16, fp16, fp32, fp64, got 'float32'"):
        env.precision()


def test_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.log_level() is None
    for value, level in {"DEBUG": logging.DEBUG, "warn": logging.WARNING, "Critical": logging.CRITICAL}.items():
        monkeypatch.setenv(f"{PREFIX}LOG_LEVEL", value)
        assert env.log_level() == level
    monkeypatch.setenv(f"{PREFIX}LOG_LEVEL", "loud")
    with pytest.raises(ValueError, match=r"LOG_LEVEL must be one of debug, info, .*, got 'loud'"):
        env.log_level()


def run_python(code: str, **variables: str) -> str:
    """What a process of its own writes to stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **variables}, capture_output=True, text=True, check=True
    )
    return run.stderr


def test_the_level_of_the_logger() -> None:
    code = "import logging, magi_attention; logging.getLogger('magi_attention.comm').info('a line')"
    assert "INFO: a line" in run_python(code, MAGI_ATTENTION_LOG_LEVEL="info")
    assert "a line" not in run_python(code, MAGI_ATTENTION_LOG_LEVEL="warning")
    assert "a line" not in run_python(code)
    set_up = "import logging; logging.basicConfig(format='own %(message)s')"
    for own in (f"{set_up}; {code}", f"import magi_attention; {set_up}; {code}"):
        assert run_python(own, MAGI_ATTENTION_LOG_LEVEL="info") == "own a line\n", "the program's handler alone prints"


def test_a_name_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_is_checked", False)
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHEKC", "1")
    monkeypatch.setenv("MAGI_ATTENTION_MIN_CHUNKS", "4")
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "cpu")
    with pytest.warns(UserWarning, match="which nothing reads") as caught:
        env.qo_comm()
    said = [str(one.message) for one in caught]
    assert len(said) == 2
    assert said[0].startswith("the environment sets MAGI_ATTENTION_MIN_CHUNKS,")
    assert "closest variable that is read is MAGI_ATTENTION_MIN_CHUNKS_PER_RANK." in said[0]
    assert "closest variable that is read is MAGI_ATTENTION_SANITY_CHECK." in said[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.backend()


# Accepted so that programs run unchanged; the kernels have no use for them.
NOT_CALLED = {"ffa_forward_sm_margin", "ffa_backward_sm_margin"}
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "magi_attention"


def documented() -> list[str]:
    """Variables in the last part of the list of names that docs/api.md is made of."""
    text = (ROOT / "docs" / "api_names.txt").read_text(encoding="utf-8")
    return text.partition("[environment]\n")[2].split()


def read_in_env() -> set[str]:
    """What env.py passes to its readers, by the syntax."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(env))) if isinstance(node, ast.Call)]
    readers = ("_read", "_value", "_flag", "_count", "_choice")
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in readers]
    return {str(call.args[0].value) for call in named if isinstance(call.args[0], ast.Constant)}


def test_documented_variables_are_those_that_are_read() -> None:
    assert set(documented()) == read_in_env() == set(env.VARIABLES)
    assert len(documented()) == len(env.VARIABLES) == len(set(env.VARIABLES))


def test_each_variable_reaches_the_package() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in documented():
        function = name.lower()
        assert (getattr(env, function).__doc__ or "").startswith(f"{name} (")
        is_called = re.search(rf"(?<!def )\b{function}\(\)", source) is not None
        assert is_called != (function in NOT_CALLED), function


def test_variables_that_are_named_anywhere_exist() -> None:
    """In messages, docstrings and pages; a name that ends in an underscore is the prefix of several."""
    pages = [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    for page in pages:
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(rf"{PREFIX}([A-Z_]*[A-Z])\b", page.read_text(encoding="utf-8")):
            assert name in env.VARIABLES, f"{page.relative_to(ROOT)}: {PREFIX}{name}"
