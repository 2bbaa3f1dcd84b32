"""The backends that the kernel suite runs over, and poisoned memory around every test of it.

A new backend adds a line to `TESTED`; the tests that take ``backend`` (and ``dtype``) then run over it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from magi_attention.kernels.interface import Backend
from magi_attention.kernels.registry import load
from magi_attention.testing.poison import poisoned_memory

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    import interpreter_bf16

    interpreter_bf16.mend()

HERE = Path(__file__).parent
LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tested:
    """``dtypes``: what the backend takes. ``num_tokens``: a length that crosses many of its tiles, in bearable time."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    device: str = "cpu"
    num_tokens: int = 1009


TESTED = (
    Tested("reference", (torch.float64, *LOW)),
    Tested("tiled", (torch.float64, *LOW)),
    Tested("cpu", LOW),
    Tested("triton", LOW, "cuda" if HAS_GPU else "cpu", 1009 if HAS_GPU else 131),
)

# Backends that cannot take most of the suite's shapes, and the tests that they have instead.
TESTED_APART = {"hopper": "test_hopper.py"}

# What of the suite the interpreter, which is slow, runs in `make test`; the rest of it runs in `make test-long`.
QUICK_IN_INTERPRETER = {
    "test_mask": torch.float32,
    "test_softcap": torch.float16,
    "test_head_dims": torch.bfloat16,
    "test_poison_reaches_what_attends_it": torch.bfloat16,
    "test_poison_merged_from_parts": torch.float32,
    "test_rows_that_attend_nothing_take_no_part": torch.float32,
}


def _marks(tested: Tested, test: str, dtype: torch.dtype | None = None) -> list[pytest.MarkDecorator]:
    slow = tested.name == "triton" and not HAS_GPU
    if not slow or (dtype is not None and QUICK_IN_INTERPRETER.get(test) == dtype):
        return []
    return [pytest.mark.long]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Last, so that backends vary fastest, and each finds the truth that the one before it was compared with.
    if "tested" not in metafunc.fixturenames:
        return
    if "dtype" in metafunc.fixturenames:
        pairs = [(tested, dtype) for dtype in (torch.float64, *LOW) for tested in TESTED if dtype in tested.dtypes]
        ids = [f"{tested.name}-{str(dtype).removeprefix('torch.')}" for tested, dtype in pairs]
        values = [pytest.param(*pair, marks=_marks(pair[0], metafunc.function.__name__, pair[1])) for pair in pairs]
        metafunc.parametrize(("tested", "dtype"), values, ids=ids)
    else:
        one_each = [pytest.param(tested, marks=_marks(tested, metafunc.function.__name__)) for tested in TESTED]
        metafunc.parametrize("tested", one_each, ids=[tested.name for tested in TESTED])


@pytest.fixture
def backend(tested: Tested) -> Backend:
    return load(tested.name)


@pytest.fixture
def device(tested: Tested) -> str:
    return tested.device


@pytest.fixture
def num_tokens_many_tiles(tested: Tested) -> int:
    return tested.num_tokens


@pytest.fixture
def tested_names() -> set[str]:
    return {tested.name for tested in TESTED} | {name for name, test in TESTED_APART.items() if (HERE / test).exists()}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield
