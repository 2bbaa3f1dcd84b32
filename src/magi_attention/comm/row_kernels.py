"""Rows moved, summed and merged on a GPU, in Triton: what `exchange_rows` does with torch's functions elsewhere.

    gather    arriving or leaving row p  <-  row rows[p]                    one program a few rows
    sum       row rows[m]  +=  arrived[places[begins[m]]] + ...             one program a row and block of columns
    merge     the same for attention, weighted by log-sum-exps              one program a row and block of heads

Every row that is written has one owner, who takes what arrived for it in the order of ranks: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_attention.common.launch import Launcher
from magi_attention.common.merge_lse import merge_lse

# Elements that a program moves, or sums, at a time.
_BLOCK = 1024
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Owners(NamedTuple):
    """Which arrived rows belong to which local ones.

    ``rows``: ``[m]`` int64, the local rows that anything arrived for, ascending. ``places``: ``[num_arrived]`` int64, the places in the
    buffer that belong to ``rows[0]`` in the order of ranks, then those of ``rows[1]``, ...; ``begins``: ``[m + 1]`` int64, where each row's
    begin in ``places``.
    """

    rows: Tensor
    begins: Tensor
    places: Tensor


def can_take(*tensors: Tensor) -> bool:
    """Whether each is rows ``[n, ...]`` that are contiguous but for the stride between them, of elements of 8 bytes at most."""
    return all(x.element_size() in _SAME_SIZE and x[:1].is_contiguous() for x in tensors)


def gather_rows_into(view: Tensor, x: Tensor, rows: Tensor) -> None:
    """``view[p] = x[rows[p]]``: ``view`` ``[n, ...]``, ``x`` ``[num_rows, ...]`` of any one dtype, ``rows`` ``[n]`` int64."""
    num_columns = x[:1].numel()
    if not view.numel():
        return
    moved = _SAME_SIZE[x.element_size()]
    columns = min(_BLOCK, triton.next_power_of_2(num_columns))
    at_once = _BLOCK // columns
    _launch_gather(
        triton.cdiv(len(rows), at_once) * triton.cdiv(num_columns, columns), x.device,
        (view.view(moved), x.view(moved), rows, len(rows), view.stride(0), x.stride(0), num_columns),
        {"ROWS": at_once, "COLUMNS": columns},
    )  # fmt: skip


def sum_rows_(into: Tensor, arrived: Tensor, owners: Owners) -> None:
    """Add ``arrived`` ``[num_arrived, ...]``, of any floating dtype, to the rows of ``into`` ``[num_rows, ...]`` that own them."""
    num_columns = into[:1].numel()
    if not arrived.numel():
        return
    columns = min(_BLOCK, triton.next_power_of_2(num_columns))
    _launch_sum(
        len(owners.rows) * triton.cdiv(num_columns, columns), into.device,
        (into, arrived, *owners, into.stride(0), arrived.stride(0), num_columns), {"COLUMNS": columns},
    )  # fmt: skip


def merge_rows_(out: Tensor, lse: Tensor, arrived_out: Tensor, arrived_lse: Tensor, owners: Owners) -> None:
    """Merge attention that arrived into that of the rows that own it, as `common.lse.merge_partial_` does.

    ``out`` ``[num_rows, num_heads, head_dim]``, ``lse`` ``[num_rows, num_heads]`` in the accumulation dtype; ``arrived_*`` of as many rows
    as arrived, ``arrived_lse`` in that dtype too.
    """
    (_, num_heads, head_dim) = out.shape
    if not arrived_out.numel():
        return
    columns = triton.next_power_of_2(head_dim)
    heads = max(1, min(_BLOCK // columns, triton.next_power_of_2(num_heads)))
    strides = (out.stride(0), lse.stride(0), arrived_out.stride(0), arrived_lse.stride(0))
    _launch_merge(
        len(owners.rows) * triton.cdiv(num_heads, heads), out.device,
        (out, lse, arrived_out, arrived_lse, *owners, *strides, num_heads, head_dim),
        {"HEADS": heads, "COLUMNS": columns},
    )  # fmt: skip


@triton.jit
def _gather_kernel(
    p_view, p_x, p_rows, num_places, s_view, s_x, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    num_blocks = tl.cdiv(num_columns, COLUMNS)
    o_places = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_columns = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_places = o_places < num_places
    rows = tl.load(p_rows + o_places, mask=m_places, other=0)
    m_cells = m_places[:, None] & (o_columns < num_columns)[None, :]
    b_x = tl.load(p_x + rows[:, None] * s_x + o_columns[None, :], mask=m_cells)
    tl.store(p_view + o_places[:, None] * s_view + o_columns[None, :], b_x, mask=m_cells)


@triton.jit
def _sum_kernel(p_into, p_arrived, p_rows, p_begins, p_places, s_into, s_arrived, num_columns, COLUMNS: tl.constexpr):
    num_blocks = tl.cdiv(num_columns, COLUMNS)
    owner = tl.program_id(0) // num_blocks
    o_columns = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_columns = o_columns < num_columns
    p_row = p_into + tl.load(p_rows + owner) * s_into + o_columns
    b_sum = tl.load(p_row, mask=m_columns)
    for at in range(tl.load(p_begins + owner), tl.load(p_begins + owner + 1)):
        b_part = tl.load(p_arrived + tl.load(p_places + at) * s_arrived + o_columns, mask=m_columns)
        b_sum += b_part.to(b_sum.dtype)
    tl.store(p_row, b_sum, mask=m_columns)


@triton.jit
def _merge_kernel(
    p_out, p_lse, p_arrived_out, p_arrived_lse, p_rows, p_begins, p_places,
    s_out, s_lse, s_arrived_out, s_arrived_lse, num_heads, head_dim, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_heads, HEADS)
    owner = tl.program_id(0) // num_blocks
    row = tl.load(p_rows + owner)
    o_heads = tl.program_id(0) % num_blocks * HEADS + tl.arange(0, HEADS)
    m_heads = o_heads < num_heads
    o_columns = tl.arange(0, COLUMNS)
    o_cells = o_heads[:, None] * head_dim + o_columns[None, :]
    m_cells = m_heads[:, None] & (o_columns < head_dim)[None, :]
    b_out = tl.load(p_out + row * s_out + o_cells, mask=m_cells)
    b_lse = tl.load(p_lse + row * s_lse + o_heads, mask=m_heads, other=0.0)
    for at in range(tl.load(p_begins + owner), tl.load(p_begins + owner + 1)):
        place = tl.load(p_places + at)
        b_part = tl.load(p_arrived_out + place * s_arrived_out + o_cells, mask=m_cells)
        b_part_lse = tl.load(p_arrived_lse + place * s_arrived_lse + o_heads, mask=m_heads, other=0.0)
        b_lse, b_keep, b_add = merge_lse(b_lse, b_part_lse)
        b_out = b_out * b_keep[:, None] + b_part.to(b_out.dtype) * b_add[:, None]
    tl.store(p_out + row * s_out + o_cells, b_out, mask=m_cells)
    tl.store(p_lse + row * s_lse + o_heads, b_lse, mask=m_heads)


_launch_gather = Launcher(_gather_kernel)
_launch_sum = Launcher(_sum_kernel)
_launch_merge = Launcher(_merge_kernel)
