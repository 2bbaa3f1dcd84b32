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


def as_autocast_casts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where autocast is on for the first one's device.

    float64 stays float64, as in torch's own attention. What is no tensor is returned as it is, for
    the checks that follow.
    """
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_narrowable(x) else x for x in tensors)


def _is_narrowable(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
