"""How the tensors of one exchange lie side by side in rows of bytes, so that they travel together.

row of bytes   |<------ k ------>|<------ v ------>|<- lse ->|    as many rows as the tensors have
views          buffer[:, a:b] in the tensor's dtype and shape: strided, never copied
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def never_traced(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which torch.compile leaves to Python: AOTAutograd gives views in another dtype a wrong shape, silently."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            result: R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class RowFormat:
    """Which bytes of a row are which tensor's.

    ``shapes``, ``dtypes``: of one row of each tensor. ``offsets``: the byte at which each begins, aligned to its dtype. ``num_bytes``: of a
    row, aligned to every dtype. There is no padding where the dtypes are equal.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def of(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> RowFormat:
        """The format of rows of ``tensors`` (each ``[rows, ...]``), converted to ``dtypes`` where those are given."""
        dtypes = tuple(x.dtype for x in tensors) if dtypes is None else tuple(dtypes)
        shapes = tuple(tuple(x.shape[1:]) for x in tensors)
        offsets, end = [], 0
        for shape, dtype in zip(shapes, dtypes, strict=True):
            offsets.append(_round_up(end, dtype.itemsize))
            end = offsets[-1] + math.prod(shape) * dtype.itemsize
        return RowFormat(shapes, dtypes, tuple(offsets), _round_up(end, max(dtype.itemsize for dtype in dtypes)))

    def empty(self, num_rows: int, device: torch.device) -> Tensor:
        """A buffer ``[num_rows, num_bytes]`` uint8, uninitialised."""
        return torch.empty(num_rows, self.num_bytes, dtype=torch.uint8, device=device)

    @never_traced
    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The tensors ``[rows, *shape]`` that lie in ``buffer``: views, contiguous but for the stride of the rows."""
        views = []
        for shape, dtype, offset in zip(self.shapes, self.dtypes, self.offsets, strict=True):
            size = math.prod(shape)
            if not size:
                views.append(torch.empty(len(buffer), *shape, dtype=dtype, device=buffer.device))
                continue
            columns = buffer[:, offset : offset + size * dtype.itemsize].view(dtype)  # [rows, size]
            views.append(columns.view(len(buffer), *shape))
        return tuple(views)

    @never_traced
    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """All rows of ``tensors``, converted, in a new buffer ``[rows, num_bytes]`` uint8."""
        first = tensors[0]
        buffer = self.empty(len(first), first.device)
        for view, x in zip(self.views(buffer), tensors, strict=True):
            view.copy_(x)
        return buffer

    @never_traced
    def gather(self, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Rows ``rows`` (``[n]`` int64) of ``tensors``, not converted, in a new buffer ``[n, num_bytes]``."""
        buffer = self.empty(len(rows), rows.device)
        for view, x in zip(self.views(buffer), tensors, strict=True):
            torch.index_select(x, 0, rows, out=view)
        return buffer


def as_wide_integers(buffer: Tensor) -> Tensor:
    """``[rows, num_bytes]`` uint8 seen in the widest integer that divides a row.

    Not every backend moves every dtype (gloo no bfloat16), but all move these; and some count the elements that they move in 32 bits, which
    wide ones put off to 16 GiB. Always a new view, also of bytes.
    """
    for dtype in (torch.int64, torch.int32):
        if buffer.shape[1] and buffer.shape[1] % dtype.itemsize == 0:
            return buffer.view(dtype)
    return buffer.view(buffer.dtype)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
