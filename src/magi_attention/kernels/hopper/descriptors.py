"""What the tensor copy engine is told of a tensor, and what it cannot be told."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# Coordinates are of 32 bits.
MOST_PLACES = 2**31 - 1


def _num_columns(x: Tensor) -> int:
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


@lru_cache(maxsize=64)
def row_layout(rows: int, columns: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory, as copies and products want it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def describe_rows(x: Tensor, block: int, columns: int | None = None) -> TensorDescriptor:
    """``x`` ``[tokens, heads, head_dim]`` as a matrix: a row a token, head ``h`` from column ``h * x.stride(1)``, whatever the strides.

    Copies are of ``block`` rows by ``columns``, head_dim if left out. One that passes the last token reads zeros there and writes nothing:
    it never reaches another head.
    """
    columns = columns or x.shape[2]
    layout = row_layout(block, columns, GLUON_DTYPES[x.dtype])
    num_columns = _num_columns(x)
    # The stride of a single row is never used, but must be one that the engine takes.
    stride = x.stride(0) if x.shape[0] > 1 else -(-num_columns // 8) * 8
    return TensorDescriptor(x, [x.shape[0], num_columns], [stride, 1], [block, columns], layout)


def why_not(name: str, x: Tensor) -> str | None:
    """Why the copy engine cannot take ``x``, in words for the user, or None if it can."""
    if x.numel() == 0:
        return None
    if x.stride(2) != 1:
        return f"{name}'s last axis must be contiguous, got strides {x.stride()}"
    per_row = 16 // x.element_size()
    if x.data_ptr() % 16 or any(x.stride(axis) % per_row for axis in (0, 1) if x.shape[axis] > 1):
        return f"{name} must begin at, and have strides of, multiples of 16 bytes, got strides {x.stride()}"
    if x.shape[0] > 1 and x.stride(0) == 0:
        return f"{name}'s tokens must not be expanded, got strides {x.stride()}"
    if _num_columns(x) > MOST_PLACES:
        return f"{name}'s heads must lie within 2**31 elements of one another, got strides {x.stride()}"
    return None
