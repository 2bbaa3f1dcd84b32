"""In which dtype attention is computed, whatever its inputs are in and whatever the caller's autocast says."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over keys are made: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """For functions whose first argument is a tensor and which multiply matrices by torch: autocast would narrow the wide tiles."""

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        assert isinstance(args[0], Tensor)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return exact
