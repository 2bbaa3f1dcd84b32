"""Memory that was not written reads as NaN: what a test of kernels must run under."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, every uninitialised tensor that Python code asks for is full of NaN (integers: of their largest value)."""
    with (
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", _poisoned(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
    ):
        yield


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            tensor.detach().fill_(torch.nan)
        elif tensor.dtype != torch.bool and not tensor.dtype.is_complex:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return made
