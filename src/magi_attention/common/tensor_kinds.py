"""Which kind of tensor a caller gives, and who looks on.

    plain           memory of its own: kernels read it by address
    asynchronous    the result of a functional collective: waited for, then plain
    DTensor         see `magi_attention.common.dtensors`
    fake, meta      a shape without memory: operators of torch answer with shapes
    other wrappers  refused: their address is null

The classes of torch.distributed are looked up among the imported modules: without the import there is no such tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

# Types of arguments that are no tensors of a subclass: asking this costs a fifth of what isinstance does.
_PLAIN = frozenset({Tensor, Parameter, type(None), bool, int, float, str})


def is_plain(*values: object) -> bool:
    """Whether no tensor among ``values`` is of a subclass."""
    for value in values:  # noqa: SIM110 - a loop costs a third of all()
        if type(value) not in _PLAIN and isinstance(value, Tensor):
            return False
    return True


def is_dtensor(x: object) -> bool:
    return _is_of(x, "torch.distributed.tensor", "DTensor")


def is_watched() -> bool:
    """Whether a dispatch mode of this thread looks on."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_no_values(x: Tensor) -> bool:
    """Whether ``x`` has a shape alone."""
    return x.is_meta or type(x) is FakeTensor


def is_observed(x: Tensor) -> bool:
    """Whether a call on ``x`` must be an operator of torch: it is traced, a dispatch mode looks on, or ``x`` has a shape alone."""
    return torch.compiler.is_compiling() or is_watched() or has_no_values(x)


@contextmanager
def for_keeping() -> Iterator[None]:
    """Tensors made in here are plain ones, to be kept: those of modes and of `torch.inference_mode` are of use in there alone."""
    with torch.inference_mode(False):
        if torch.compiler.is_dynamo_compiling() or not is_watched():
            yield
        else:
            with _disable_current_modes():
                yield


def as_constant(x: Tensor) -> Tensor:
    """A kept tensor ``x`` as modes take it: fake tensors of the same values, or a constant of a graph, are made of it as of a new one."""
    if torch.compiler.is_dynamo_compiling() or not is_watched():
        return x
    constant: Tensor = torch.ops.aten.lift_fresh(x)
    return constant


def settled(name: str, x: Any) -> Any:
    """``x`` once it can be used: the result of a functional collective is waited for, what is no tensor is as it was.

    Raises:
        ValueError: a wrapper subclass that has no memory of its own and is neither a DTensor nor a fake tensor.
    """
    if is_plain(x) or is_dtensor(x) or type(x) is FakeTensor:
        return x
    if _is_of(x, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        if torch.compiler.is_compiling():
            return x  # AOTAutograd waits for the inputs of a graph
        return _Wait.apply(x) if x.requires_grad else x.trigger_wait()  # type: ignore[no-untyped-call]
    if not _has_memory(x):
        raise ValueError(
            f"{name} must be a plain tensor, a DTensor or the result of a functional collective, got a {type(x).__name__}: a wrapper "
            "with no memory of its own that a kernel could read. Pass the plain tensor that it wraps"
        )
    return x


def address(x: Tensor) -> int:
    """The address of the memory of ``x``, for a kernel that reads there.

    Raises:
        ValueError: ``x`` has elements and no memory.
    """
    pointer = x.data_ptr()
    if not pointer and x.numel():
        raise ValueError(
            f"a kernel must read {list(x.shape)} elements of a {type(x).__name__} that has no memory of its own; pass the plain tensor "
            "that it wraps"
        )
    return pointer


class _Wait(torch.autograd.Function):
    """An asynchronous tensor's plain one."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        waited: Tensor = x.trigger_wait()
        return waited.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _is_of(x: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def _has_memory(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return not is_traceable_wrapper_subclass(x)
    try:
        return x.numel() == 0 or x.data_ptr() != 0
    except RuntimeError:  # torch's answer for a tensor without storage
        return False
