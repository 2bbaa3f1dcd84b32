"""The backends that the kernel suite runs over, and poisoned memory around every test of it.

A new backend adds a line to `TESTED`; the tests that take ``backend`` (and ``dtype``) then run over it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from magi_attention.kernels.interface import Backend
from magi_attention.kernels.registry import load
from magi_attention.testing.poison import poisoned_memory

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
)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Last, so that backends vary fastest, and each finds the truth that the one before it was compared with.
    if "tested" not in metafunc.fixturenames:
        return
    if "dtype" in metafunc.fixturenames:
        pairs = [(tested, dtype) for dtype in (torch.float64, *LOW) for tested in TESTED if dtype in tested.dtypes]
        ids = [f"{tested.name}-{str(dtype).removeprefix('torch.')}" for tested, dtype in pairs]
        metafunc.parametrize(("tested", "dtype"), pairs, ids=ids)
    else:
        metafunc.parametrize("tested", TESTED, ids=[tested.name for tested in TESTED])


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
    return {tested.name for tested in TESTED}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield
