"""The forward kernel: one program a (tile of queries, head), online softmax over the tile's segments. Writes each row once; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.common.merge_lse import merge_lse
from magi_attention.kernels.triton.steps import add_to_rows, attended, edge_rows, load_rows, tanh


@triton.jit
def _attend_block(
    b_q, b_acc, b_top, b_total, b_raw, p_k, p_v, s_k, s_v, o_k, end_k, m_rows, m_cells, scale_log2, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr, RAW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_rows(p_k, o_k, s_k, end_k, tl.arange(0, BLOCK_D), D, MASKED)  # [k, d]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [q, k]
    if CAPPED:
        if RAW:
            b_raw = tl.maximum(b_raw, tl.max(tl.where(m_cells, b_s * scale_log2, float("-inf")), 1))
        b_s = tanh(b_s * scale_log2) * cap_log2
    else:
        b_s = b_s * scale_log2
    if MASKED:
        b_s = tl.where(m_cells, b_s, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    # A row that has attended nothing yet stays at -inf; subtracting 0 there keeps NaN out.
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_p = tl.exp2(b_s - b_base[:, None])
    b_shrink = tl.exp2(b_top - b_base)
    b_total = b_total * b_shrink + tl.sum(b_p, 1)
    b_acc = b_acc * b_shrink[:, None]
    b_v = load_rows(p_v, o_k, s_v, end_k, tl.arange(0, BLOCK_DV), DV, MASKED)  # [k, dv]
    b_acc = add_to_rows(b_acc, b_p.to(b_v.dtype), b_v, m_rows, MASKED, PRECISION)
    return b_acc, b_new, b_total, b_raw


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_max, p_order, p_inner_rows, p_inner, p_edge_rows, p_edges,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, num_q, num_k, scale_log2, cap_log2, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, CAPPED: tl.constexpr, RAW: tl.constexpr, MERGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tl.load(p_order + program // num_heads)
    head = program % num_heads
    o_q = tile * TILE_Q + tl.arange(0, TILE_Q)
    b_q = load_rows(p_q + head.to(tl.int64) * s_qh, o_q, s_qt, num_q, tl.arange(0, BLOCK_D), D, True)
    p_k += (head // GROUP).to(tl.int64) * s_kh
    p_v += (head // GROUP).to(tl.int64) * s_vh
    b_top = tl.full([TILE_Q], float("-inf"), tl.float32)
    b_raw = tl.full([TILE_Q], float("-inf"), tl.float32)
    b_total = tl.zeros([TILE_Q], tl.float32)
    b_acc = tl.zeros([TILE_Q, BLOCK_DV], tl.float32)
    m_all = tl.full([1, 1], True, tl.int1)

    for at in range(tl.load(p_inner_rows + tile * 2), tl.load(p_inner_rows + tile * 2 + 1)):
        begin = tl.load(p_inner + at * 2)
        end = tl.load(p_inner + at * 2 + 1)
        for start in tl.range(begin, end, TILE_K):
            b_acc, b_top, b_total, b_raw = _attend_block(
                b_q, b_acc, b_top, b_total, b_raw, p_k, p_v, s_kt, s_vt, start + tl.arange(0, TILE_K), num_k, m_all, m_all,
                scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, RAW, False, PRECISION,
            )  # fmt: skip
    for at in range(tl.load(p_edge_rows + tile * 2), tl.load(p_edge_rows + tile * 2 + 1)):
        p_edge = p_edges + at * 6
        m_edge_rows = edge_rows(o_q, p_edge)
        # What lies past the segment's keys counts as 0: another document's, it may be NaN.
        end_k = tl.minimum(tl.load(p_edge + 1), num_k)
        for start in tl.range(tl.load(p_edge), tl.load(p_edge + 1), TILE_K, num_stages=1):
            o_k = start + tl.arange(0, TILE_K)
            b_acc, b_top, b_total, b_raw = _attend_block(
                b_q, b_acc, b_top, b_total, b_raw, p_k, p_v, s_kt, s_vt, o_k, end_k, m_edge_rows, attended(o_q, o_k, p_edge),
                scale_log2, cap_log2, D, DV, BLOCK_D, BLOCK_DV, CAPPED, RAW, True, PRECISION,
            )  # fmt: skip

    m_any = b_total != 0  # so also where it is NaN
    b_safe = tl.where(m_any, b_total, 1.0)
    b_lse = tl.where(m_any, (b_top + tl.log2(b_safe)) * 0.6931471805599453, float("-inf"))
    b_weight = tl.where(m_any, 1.0 / b_safe, 0.0)
    m_rows = o_q < num_q
    o_columns = tl.arange(0, BLOCK_DV)
    row = o_q.to(tl.int64) * num_heads + head
    p_rows = p_out + row[:, None] * DV + o_columns[None, :]
    m_out = m_rows[:, None] & (o_columns < DV)[None, :]
    if MERGE:
        b_old = tl.load(p_lse + row, mask=m_rows, other=float("-inf"))
        b_lse, b_keep, b_add = merge_lse(b_old, b_lse)
        b_out = tl.load(p_rows, mask=m_out, other=0.0) * b_keep[:, None] + b_acc * (b_weight * b_add)[:, None]
    else:
        b_out = b_acc * b_weight[:, None]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + row, b_lse, mask=m_rows)
    if RAW:
        b_best = tl.max(tl.where(m_rows, b_raw if CAPPED else b_top, float("-inf")), 0)
        tl.store(p_max + tile.to(tl.int64) * num_heads + head, b_best)
