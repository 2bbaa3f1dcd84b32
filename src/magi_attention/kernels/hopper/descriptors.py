"""What the tensor copy engine is told of a tensor, and what it cannot be told."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from magi_attention.common.tensor_kinds import address

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# Coordinates are of 32 bits.
MOST_PLACES = 2**31 - 1


@lru_cache(maxsize=64)
def row_layout(rows: int, columns: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory, as copies and products want it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


class Tiles(NamedTuple):
    """A tensor, and the tiles that are copied of it: Gluon's ``TensorDescriptor``, which it becomes where a kernel is compiled.

    That one checks itself whenever it is made, at a cost that short kernels would feel.
    """

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: gl.NVMMASharedLayout
    padding: str = "zero"

    def likeness(self) -> Hashable:
        """See `common.launch.Described`: the layout follows from the rest."""
        return self.base.dtype, *self.block_shape

    def in_full(self) -> TensorDescriptor:
        return TensorDescriptor(*self)


def describe_rows(x: Tensor, block: int, columns: int | None = None) -> Tiles:
    """``x`` ``[tokens, heads, head_dim]`` as a matrix: a row a token, head ``h`` from column ``h * x.stride(1)``, whatever the strides.

    Copies are of ``block`` rows by ``columns``, head_dim if left out. One that passes the last token reads zeros there and writes nothing:
    it never reaches another head.
    """
    num_tokens, num_heads, head_dim = x.shape
    by_token, by_head, _ = x.stride()
    columns = columns or head_dim
    num_columns = (num_heads - 1) * by_head + head_dim
    # The stride of a single row is never used, but must be one that the engine takes.
    stride = by_token if num_tokens > 1 else -(-num_columns // 8) * 8
    layout = row_layout(block, columns, GLUON_DTYPES[x.dtype])
    return Tiles(x, [num_tokens, num_columns], [stride, 1], [block, columns], layout)


def why_not(name: str, x: Tensor) -> str | None:
    """Why the copy engine cannot take ``x``, in words for the user, or None if it can."""
    num_tokens, num_heads, head_dim = x.shape
    by_token, by_head, by_column = strides = x.stride()
    if not num_tokens * num_heads * head_dim:
        return None
    if by_column != 1:
        return f"{name}'s last axis must be contiguous, got strides {strides}"
    per_row = 16 // x.element_size()
    if address(x) % 16 or (by_token % per_row and num_tokens > 1) or (by_head % per_row and num_heads > 1):
        return f"{name} must begin at, and have strides of, multiples of 16 bytes, got strides {strides}"
    if num_tokens > 1 and by_token == 0:
        return f"{name}'s tokens must not be expanded, got strides {strides}"
    if (num_heads - 1) * by_head + head_dim > MOST_PLACES:
        return f"{name}'s heads must lie within 2**31 elements of one another, got strides {strides}"
    return None
