"""The backward in two kernels: dk and dv, one program a (tile of keys, kv head); dq, one a (tile of queries, head).

Seven products where a fused kernel needs five; but every row has one owner, so there are no atomics, and the same inputs
give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.kernels.triton.steps import add_to_rows, attended, edge_rows, load_rows, tanh


@triton.jit
def _score_gradients(
    b_s, b_dp, b_lse_log2, b_delta, m_cells, scale_log2, cap_log2, CAPPED: tl.constexpr, MASKED: tl.constexpr
):
    """Probabilities and gradients of raw scores from raw scores and gradients of probabilities; statistics are broadcast to their shape."""
    if CAPPED:
        b_t = tanh(b_s * scale_log2)
        b_logit = b_t * cap_log2 - b_lse_log2
    else:
        b_logit = b_s * scale_log2 - b_lse_log2
    # No logit is above the lse, except by the rounding of both, which is large where they are.
    b_p = tl.exp2(tl.minimum(b_logit, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if MASKED:
        b_p = tl.where(m_cells, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta)
    if CAPPED:
        b_ds = b_ds * (1.0 - b_t * b_t)
    return b_p, b_ds


@triton.jit
def _load_statistics(p_lse, p_delta, o_q, num_q, num_heads, head):
    row = o_q.to(tl.int64) * num_heads + head
    m_rows = o_q < num_q
    b_lse = tl.load(p_lse + row, mask=m_rows, other=float("-inf"))
    # exp2(s - inf) is 0: what rows without any key, and rows behind the last, must give.
    b_lse_log2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)
    return b_lse_log2, tl.load(p_delta + row, mask=m_rows, other=0.0)


@triton.jit
def _keys_block(
    b_k, b_v, b_dk, b_dv, p_q, p_do, p_lse, p_delta, s_qt, s_dot, o_q, end_q, num_heads, head, m_rows, m_cells, scale_log2, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_q = load_rows(p_q, o_q, s_qt, end_q, tl.arange(0, BLOCK_D), D, MASKED)  # [q, d]
    # Transposed, [k, q], so that probabilities are the left side of their product as they come.
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_do = load_rows(p_do, o_q, s_dot, end_q, tl.arange(0, BLOCK_DV), DV, MASKED)  # [q, dv]
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_lse_log2, b_delta = _load_statistics(p_lse, p_delta, o_q, end_q, num_heads, head)
    b_p, b_ds = _score_gradients(
        b_s, b_dp, b_lse_log2[None, :], b_delta[None, :], m_cells, scale_log2, cap_log2, CAPPED, MASKED
    )
    b_dv = add_to_rows(b_dv, b_p.to(b_do.dtype), b_do, m_rows, MASKED, PRECISION)
    b_dk = add_to_rows(b_dk, b_ds.to(b_q.dtype), b_q, m_rows, MASKED, PRECISION)
    return b_dk, b_dv


@triton.jit
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_order, p_inner_rows, p_inner, p_edge_rows, p_edges,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, s_dot, s_doh, num_q, num_k, scale, scale_log2, cap_log2, num_kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tl.load(p_order + program // num_kv_heads)
    kv_head = program % num_kv_heads
    num_heads = num_kv_heads * GROUP
    o_k = tile * TILE_K + tl.arange(0, TILE_K)
    b_k = load_rows(p_k + kv_head.to(tl.int64) * s_kh, o_k, s_kt, num_k, tl.arange(0, BLOCK_D), D, True)
    b_v = load_rows(p_v + kv_head.to(tl.int64) * s_vh, o_k, s_vt, num_k, tl.arange(0, BLOCK_DV), DV, True)
    b_dk = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE_K, BLOCK_DV], tl.float32)
    m_all = tl.full([1, 1], True, tl.int1)
    # Loaded before the loop over heads: inside it, they would cost registers that the products need.
    inner_begin = tl.load(p_inner_rows + tile * 2)
    inner_end = tl.load(p_inner_rows + tile * 2 + 1)
    edge_begin = tl.load(p_edge_rows + tile * 2)
    edge_end = tl.load(p_edge_rows + tile * 2 + 1)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        p_qh = p_q + head.to(tl.int64) * s_qh
        p_doh = p_do + head.to(tl.int64) * s_doh
        for at in range(inner_begin, inner_end):
            for start in tl.range(tl.load(p_inner + at * 2), tl.load(p_inner + at * 2 + 1), TILE_Q):
                b_dk, b_dv = _keys_block(
                    b_k, b_v, b_dk, b_dv, p_qh, p_doh, p_lse, p_delta, s_qt, s_dot, start + tl.arange(0, TILE_Q), num_q,
                    num_heads, head, m_all, m_all, scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, False, PRECISION,
                )  # fmt: skip
        for at in range(edge_begin, edge_end):
            p_edge = p_edges + at * 6
            m_edge_rows = edge_rows(o_k, p_edge)
            end_q = tl.minimum(tl.load(p_edge + 1), num_q)
            for start in tl.range(tl.load(p_edge), tl.load(p_edge + 1), TILE_Q, num_stages=1):
                o_q = start + tl.arange(0, TILE_Q)
                m_cells = attended(o_k, o_q, p_edge)  # the list is of the transposed table
                b_dk, b_dv = _keys_block(
                    b_k, b_v, b_dk, b_dv, p_qh, p_doh, p_lse, p_delta, s_qt, s_dot, o_q, end_q,
                    num_heads, head, m_edge_rows, m_cells, scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, True, PRECISION,
                )  # fmt: skip
    row = o_k.to(tl.int64) * num_kv_heads + kv_head
    _store_rows(p_dk, row, b_dk * scale, o_k < num_k, D, BLOCK_D)
    _store_rows(p_dv, row, b_dv, o_k < num_k, DV, BLOCK_DV)


@triton.jit
def _store_rows(p, row, b_x, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_columns = tl.arange(0, BLOCK_D)
    p_rows = p + row[:, None] * D + o_columns[None, :]
    tl.store(p_rows, b_x.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_columns < D)[None, :])


@triton.jit
def _queries_block(
    b_q, b_do, b_lse_log2, b_delta, b_dq, p_k, p_v, s_k, s_v, o_k, end_k, m_rows, m_cells, scale_log2, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_rows(p_k, o_k, s_k, end_k, tl.arange(0, BLOCK_D), D, MASKED)
    b_v = load_rows(p_v, o_k, s_v, end_k, tl.arange(0, BLOCK_DV), DV, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    _, b_ds = _score_gradients(
        b_s, b_dp, b_lse_log2[:, None], b_delta[:, None], m_cells, scale_log2, cap_log2, CAPPED, MASKED
    )
    return add_to_rows(b_dq, b_ds.to(b_k.dtype), b_k, m_rows, MASKED, PRECISION)


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dq, p_order, p_inner_rows, p_inner, p_edge_rows, p_edges,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, s_dot, s_doh, num_q, num_k, scale, scale_log2, cap_log2, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CAPPED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tl.load(p_order + program // num_heads)
    head = program % num_heads
    o_q = tile * TILE_Q + tl.arange(0, TILE_Q)
    b_q = load_rows(p_q + head.to(tl.int64) * s_qh, o_q, s_qt, num_q, tl.arange(0, BLOCK_D), D, True)
    b_do = load_rows(p_do + head.to(tl.int64) * s_doh, o_q, s_dot, num_q, tl.arange(0, BLOCK_DV), DV, True)
    b_lse_log2, b_delta = _load_statistics(p_lse, p_delta, o_q, num_q, num_heads, head)
    p_k += (head // GROUP).to(tl.int64) * s_kh
    p_v += (head // GROUP).to(tl.int64) * s_vh
    b_dq = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    m_all = tl.full([1, 1], True, tl.int1)
    for at in range(tl.load(p_inner_rows + tile * 2), tl.load(p_inner_rows + tile * 2 + 1)):
        for start in tl.range(tl.load(p_inner + at * 2), tl.load(p_inner + at * 2 + 1), TILE_K):
            b_dq = _queries_block(
                b_q, b_do, b_lse_log2, b_delta, b_dq, p_k, p_v, s_kt, s_vt, start + tl.arange(0, TILE_K), num_k, m_all, m_all,
                scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, False, PRECISION,
            )  # fmt: skip
    for at in range(tl.load(p_edge_rows + tile * 2), tl.load(p_edge_rows + tile * 2 + 1)):
        p_edge = p_edges + at * 6
        m_edge_rows = edge_rows(o_q, p_edge)
        end_k = tl.minimum(tl.load(p_edge + 1), num_k)
        for start in tl.range(tl.load(p_edge), tl.load(p_edge + 1), TILE_K, num_stages=1):
            o_k = start + tl.arange(0, TILE_K)
            b_dq = _queries_block(
                b_q, b_do, b_lse_log2, b_delta, b_dq, p_k, p_v, s_kt, s_vt, o_k, end_k, m_edge_rows, attended(o_q, o_k, p_edge),
                scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, True, PRECISION,
            )  # fmt: skip
    b_dq = b_dq * scale
    row = o_q.to(tl.int64) * num_heads + head
    m_rows = o_q < num_q
    if ADD:
        o_columns = tl.arange(0, BLOCK_D)
        p_rows = p_dq + row[:, None] * D + o_columns[None, :]
        b_dq += tl.load(p_rows, mask=m_rows[:, None] & (o_columns < D)[None, :], other=0.0)
    _store_rows(p_dq, row, b_dq, m_rows, D, BLOCK_D)
