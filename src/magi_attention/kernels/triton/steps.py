"""Pieces that the kernels share: masks, scores, and the rectangle loads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(p_base, o_rows, stride, num_rows, o_columns, NUM_COLUMNS: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """``[rows, columns]`` of a tensor whose last axis is contiguous; what lies outside is 0."""
    p = p_base + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    if CHECK_ROWS:
        if o_columns.shape[0] == NUM_COLUMNS:
            return tl.load(p, mask=(o_rows < num_rows)[:, None], other=0.0)
        return tl.load(p, mask=(o_rows < num_rows)[:, None] & (o_columns < NUM_COLUMNS)[None, :], other=0.0)
    if o_columns.shape[0] == NUM_COLUMNS:
        return tl.load(p)
    return tl.load(p, mask=(o_columns < NUM_COLUMNS)[None, :], other=0.0)


@triton.jit
def add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """``b_sum + b_left @ b_right``, for sums over many tiles.

    The ordinary units, which make IEEE products of float32 numbers, would go on from the sum term by term, and the rounding error would
    grow with the number of terms. Each tile's product by itself, it grows with that of tiles.
    """
    if b_left.dtype == tl.float32 and PRECISION == "ieee":
        # The limit, which means nothing here, keeps the compiler from making one of product and sum.
        return b_sum + tl.dot(b_left, b_right, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def add_to_rows(b_sum, b_left, b_right, m_rows, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """`add_product`; of an edge segment, to its own rows alone: 0 * NaN of its other side would reach rows of other documents."""
    if MASKED:
        return b_sum + tl.where(m_rows[:, None], tl.dot(b_left, b_right, input_precision=PRECISION), 0.0)
    return add_product(b_sum, b_left, b_right, PRECISION)


@triton.jit
def edge_rows(o_rows, p_edge):
    """``[rows]`` bool: the rows of an edge segment."""
    return (o_rows >= tl.load(p_edge + 4)) & (o_rows < tl.load(p_edge + 5))


@triton.jit
def tanh(x):
    """Of any size: 1 - 2 / (exp(2x) + 1), by a bounded exponent; near 0 by its series, where that loses digits."""
    y = tl.minimum(tl.maximum(x, -10.0), 10.0)
    e = tl.exp2(y * 2.8853900817779268)
    y2 = y * y
    series = y * (1.0 + y2 * (-0.33333333 + y2 * (0.13333333 + y2 * -0.05396825)))
    return tl.where(y2 < 0.01, series, (e - 1.0) / (e + 1.0))


@triton.jit
def attended(o_q, o_k, p_edge):
    """``[q, k]`` bool of an edge segment: its keys, its queries, its band."""
    end = tl.load(p_edge + 1)
    lo = tl.load(p_edge + 2)
    hi = tl.load(p_edge + 3)
    diagonal = o_k[None, :] - o_q[:, None]
    return edge_rows(o_q, p_edge)[:, None] & (o_k < end)[None, :] & (diagonal >= lo) & (diagonal <= hi)
