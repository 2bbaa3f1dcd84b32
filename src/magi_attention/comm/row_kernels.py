"""Rows moved, summed and merged on a GPU, in Triton: what `exchange_rows` does with torch's functions elsewhere.

    gather    arriving or leaving row p  <-  row rows[p]                    one program a few rows
    sum       row rows[m]  +=  arrived[places[begins[m]]] + ...             one program a row and block of columns
    merge     the same for attention, weighted by log-sum-exps              one program a row and head

Every row that is written has one owner, who takes what arrived for it in the order of ranks: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    block = (_BLOCK // columns, columns)
    grid = (triton.cdiv(len(rows), block[0]) * triton.cdiv(num_columns, columns),)
    _gather_kernel[grid](
        view.view(moved), x.view(moved), rows, len(rows), view.stride(0), x.stride(0), num_columns, *block
    )


def sum_rows_(into: Tensor, arrived: Tensor, owners: Owners) -> None:
    """Add ``arrived`` ``[num_arrived, ...]``, of any floating dtype, to the rows of ``into`` ``[num_rows, ...]`` that own them."""
    num_columns = into[:1].numel()
    if not arrived.numel():
        return
    columns = min(_BLOCK, triton.next_power_of_2(num_columns))
    grid = (len(owners.rows) * triton.cdiv(num_columns, columns),)
    _sum_kernel[grid](into, arrived, *owners, into.stride(0), arrived.stride(0), num_columns, columns)


def merge_rows_(out: Tensor, lse: Tensor, arrived_out: Tensor, arrived_lse: Tensor, owners: Owners) -> None:
    """Merge attention that arrived into that of the rows that own it, as `common.lse.merge_partial_` does.

    ``out`` ``[num_rows, num_heads, head_dim]``, ``lse`` ``[num_rows, num_heads]`` in the accumulation dtype; ``arrived_*`` of as many rows
    as arrived, ``arrived_lse`` in that dtype too.
    """
    (_, num_heads, head_dim) = out.shape
    if not arrived_out.numel():
        return
    _merge_kernel[(len(owners.rows) * num_heads,)](
        out, lse, arrived_out, arrived_lse, *owners,
        out.stride(0), lse.stride(0), arrived_out.stride(0), arrived_lse.stride(0), num_heads, head_dim,
        triton.next_power_of_2(head_dim),
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
    s_out, s_lse, s_arrived_out, s_arrived_lse, num_heads, head_dim, COLUMNS: tl.constexpr,
):  # fmt: skip
    owner = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    row = tl.load(p_rows + owner)
    o_columns = tl.arange(0, COLUMNS)
    m_columns = o_columns < head_dim
    p_row = p_out + row * s_out + head * head_dim + o_columns
    b_out = tl.load(p_row, mask=m_columns)
    lse = tl.load(p_lse + row * s_lse + head)
    for at in range(tl.load(p_begins + owner), tl.load(p_begins + owner + 1)):
        place = tl.load(p_places + at)
        b_part = tl.load(p_arrived_out + place * s_arrived_out + head * head_dim + o_columns, mask=m_columns)
        part_lse = tl.load(p_arrived_lse + place * s_arrived_lse + head)
        top = tl.maximum(lse, part_lse)
        base = tl.where(top == float("-inf"), 0.0, top)
        keep = tl.exp(lse - base)
        add = tl.exp(part_lse - base)
        total = keep + add
        some = tl.where(total > 0, total, 1.0)
        b_out = b_out * (keep / some) + b_part.to(b_out.dtype) * (add / some)
        lse = tl.where(total > 0, base + tl.log(some), top)
    tl.store(p_row, b_out, mask=m_columns)
    tl.store(p_lse + row * s_lse + head, lse)
