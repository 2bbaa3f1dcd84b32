"""Functions that have gradients, and no gradients of gradients: differentiating twice raises an error instead of losing a term.

torch's decorator of this name does not connect the gradients to q, k and v. A penalty on the
gradient of q is then cut off from q: `torch.autograd.grad(..., allow_unused=True)` gives None, and
a loss that has other terms too loses the penalty without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refusal(name: str) -> RuntimeError:
    """The error of differentiating the gradients of ``name``."""
    return RuntimeError(f"{name} is once_differentiable: it has no gradients of gradients")


class _Refused(torch.autograd.Function):
    """The first ``num_grads`` tensors, as they are, as a function of all of them that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, num_grads: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if x is None else x.view_as(x) for x in tensors[:num_grads])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise refusal(ctx.name)


def as_once_differentiable(
    name: str, grads: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """``grads``; under ``create_graph``, as a function of ``inputs`` that cannot be differentiated."""
    if not torch.is_grad_enabled():
        return grads
    refused: tuple[Tensor | None, ...] = _Refused.apply(name, len(grads), *grads, *inputs)
    return refused
