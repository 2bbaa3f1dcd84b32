"""The forward kernel: a producer warp that copies tiles by TMA, and warpgroups that each own 64 queries of a (tile, head).

    consumer 0   QK(1) PV(0) | softmax(1)   | QK(2) PV(1) | softmax(2) ...     a consumer's softmax runs
    consumer 1     softmax(0)  | QK(1) PV(0) | softmax(1)   | QK(2) PV(1)      under the other's products

Within a consumer too, the product of the next scores is in flight while the last probabilities are multiplied with values. The
programs are persistent: the producer fetches the next tile while consumers write this one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from magi_attention.common.merge_lse import merge_lse
from magi_attention.kernels.hopper.steps import load_segment, locate, mask_scores, pick_item


@gluon.jit
def _produce(
    d_q, d_k, d_v, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free, p_order, p_rows, p_segments,
    s_qh, s_kh, s_vh, num_items, num_heads, at_once, group,
    CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 64
    step = 0
    for start in range(gl.program_id(0), num_items, gl.num_programs(0)):
        item = pick_item(start, num_items)
        turn = start // gl.num_programs(0)
        rank, head = locate(item, num_items // num_heads, num_heads, at_once)
        tile = gl.load(p_order + rank)
        kv_head = head // group
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), d_q.block_type.nbytes)
            row = (tile * CONSUMERS + c) * ROWS
            tma.async_copy_global_to_shared(d_q, [row, head * s_qh], q_full.index(c), q_s.index(c))
        for at in range(gl.load(p_rows + tile), gl.load(p_rows + tile + 1)):
            begin = gl.load(p_segments + at * 8)
            end = gl.load(p_segments + at * 8 + 1)
            for k in range(begin, end, BLOCK):
                slot = step % STAGES
                free = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(slot), free)
                mbarrier.expect(k_full.index(slot), d_k.block_type.nbytes)
                tma.async_copy_global_to_shared(d_k, [k, kv_head * s_kh], k_full.index(slot), k_s.index(slot))
                mbarrier.wait(v_free.index(slot), free)
                mbarrier.expect(v_full.index(slot), d_v.block_type.nbytes)
                tma.async_copy_global_to_shared(d_v, [k, kv_head * s_vh], v_full.index(slot), v_s.index(slot))
                step += 1


@gluon.jit
def _softmax(s, top, total, scale_log2):
    """Probabilities of scores against the largest yet, the updated statistics, and what earlier sums shrink by."""
    new = gl.maximum(top, gl.max(s, 1) * scale_log2)
    # A row that has attended nothing yet stays at -inf; subtracting 0 there keeps NaN out.
    base = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * scale_log2 - base[:, None])
    shrink = gl.exp2(top - base)
    return p, new, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _consume(
    INDEX: gl.constexpr, out, p_lse, p_top, q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free, turns,
    p_order, p_rows, p_segments, num_q, scale_log2, num_items, num_heads, at_once,
    CONSUMERS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    TMA_OUT: gl.constexpr, MERGE: gl.constexpr, RAW: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums, k_width=2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    zero = gl.zeros([ROWS, BLOCK], gl.float32, layout=scores)
    q = q_s.index(INDEX)
    step = 0
    phase = 0
    for start in range(gl.program_id(0), num_items, gl.num_programs(0)):
        item = pick_item(start, num_items)
        turn = start // gl.num_programs(0)
        rank, head = locate(item, num_items // num_heads, num_heads, at_once)
        tile = gl.load(p_order + rank)
        row = (tile * CONSUMERS + INDEX) * ROWS + gl.arange(0, ROWS, layout=by_row)
        first_at = gl.load(p_rows + tile)
        segment = load_segment(p_segments, first_at)

        mbarrier.wait(q_full.index(INDEX), turn & 1)
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        s = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(slot), count=1)
        if (segment[0] < segment[2]) | (segment[0] + BLOCK > segment[3]):
            s = mask_scores(s, segment[0], row, segment, BLOCK, scores)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=by_row)
        total = gl.full([ROWS], 0.0, gl.float32, layout=by_row)
        p, top, total, _first = _softmax(s, top, total, scale_log2)
        b_p = gl.convert_layout(p.to(q_s.dtype), left)
        acc = gl.zeros([ROWS, D], gl.float32, layout=sums)

        for at in range(first_at, gl.load(p_rows + tile + 1)):
            if at > first_at:
                segment = load_segment(p_segments, at)
            for k in range(gl.where(at == first_at, segment[0] + BLOCK, segment[0]), segment[1], BLOCK):
                last = step % STAGES
                parity = (step // STAGES) & 1
                step += 1
                slot = step % STAGES
                mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
                if TURNS:
                    mbarrier.wait(turns.index(INDEX), (phase & 1) ^ (1 - INDEX))
                    phase += 1
                s = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(last), parity)
                acc = warpgroup_mma(b_p, v_s.index(last), acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turns.index(1 - INDEX), count=1)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(k_free.index(slot), count=1)
                if (k < segment[2]) | (k + BLOCK > segment[3]):
                    s = mask_scores(s, k, row, segment, BLOCK, scores)
                p, top, total, shrink = _softmax(s, top, total, scale_log2)
                # ptxas would draw the wait for the product up before the softmax that should run under it, but not over a loop: this
                # one, on a barrier that has been passed, ends at once.
                mbarrier.wait(v_full.index(last), parity)
                acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                mbarrier.arrive(v_free.index(last), count=1)
                b_p = gl.convert_layout(p.to(q_s.dtype), left)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]

        mbarrier.arrive(q_free.index(INDEX), count=1)
        last = step % STAGES
        mbarrier.wait(v_full.index(last), (step // STAGES) & 1)
        acc = warpgroup_mma(b_p, v_s.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(last), count=1)
        step += 1
        _finish(INDEX, out, p_lse, p_top, o_s, acc, top, total, row, tile, head, num_q, num_heads,
                CONSUMERS, D, TMA_OUT, MERGE, RAW)  # fmt: skip
    if TMA_OUT:
        tma.store_wait(0)


@gluon.jit
def _finish(
    INDEX: gl.constexpr, out, p_lse, p_top, o_s, acc, top, total, row, tile, head, num_q, num_heads,
    CONSUMERS: gl.constexpr, D: gl.constexpr, TMA_OUT: gl.constexpr, MERGE: gl.constexpr, RAW: gl.constexpr,
):  # fmt: skip
    """Writes a tile's rows and their statistics, merged into what is there already with ``MERGE``."""
    m_any = total > 0
    m_rows = row < num_q
    safe = gl.where(m_any, total, 1.0)
    lse = gl.where(m_any, (top + gl.log2(safe)) * 0.6931471805599453, float("-inf"))
    weight = gl.where(m_any, 1.0 / safe, 0.0)
    keep = weight
    at = row.to(gl.int64) * num_heads + head
    if MERGE:
        lse, keep, add = merge_lse(gl.load(p_lse + at, mask=m_rows, other=float("-inf")), lse)
        weight = weight * add
    gl.store(p_lse + at, lse, mask=m_rows)
    if RAW:
        best = gl.max(gl.where(m_rows, top, float("-inf")), 0)
        gl.store(p_top + (tile * CONSUMERS + INDEX).to(gl.int64) * num_heads + head, best)
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    b_out = acc * gl.convert_layout(weight, layout)[:, None]
    if TMA_OUT:
        staged = o_s.index(INDEX)
        tma.store_wait(0)
        gl.thread_barrier()
        staged.store(b_out.to(out.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [(tile * CONSUMERS + INDEX) * 64, head * D], staged)
    else:
        o_row = gl.convert_layout(row, layout)
        column = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
        p_out = out + ((o_row.to(gl.int64) * num_heads + head) * D)[:, None] + column[None, :]
        m_out = (o_row < num_q)[:, None] & (column < D)[None, :]
        if MERGE:
            b_out += gl.load(p_out, mask=m_out, other=0.0) * gl.convert_layout(keep, layout)[:, None]
        gl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)


@gluon.jit(do_not_specialize=["s_qh", "s_kh", "s_vh", "num_q", "num_items", "num_heads", "at_once", "group"])
def forward_kernel(
    d_q, d_k, d_v, out, p_lse, p_top, p_order, p_rows, p_segments, s_qh, s_kh, s_vh, num_q, scale_log2, num_items, num_heads,
    at_once, group, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    TMA_OUT: gl.constexpr, MERGE: gl.constexpr, RAW: gl.constexpr, TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 64
    q_s = gl.allocate_shared_memory(d_q.dtype, [CONSUMERS, ROWS, D], d_q.layout)
    k_s = gl.allocate_shared_memory(d_k.dtype, [STAGES, BLOCK, D], d_k.layout)
    v_s = gl.allocate_shared_memory(d_v.dtype, [STAGES, BLOCK, D], d_v.layout)
    o_s = gl.allocate_shared_memory(d_q.dtype, [CONSUMERS, ROWS, D], d_q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_free.index(c), count=1)
        mbarrier.init(turns.index(c), count=1)
    for b in gl.static_range(STAGES):
        mbarrier.init(k_full.index(b), count=1)
        mbarrier.init(v_full.index(b), count=1)
        mbarrier.init(k_free.index(b), count=CONSUMERS)
        mbarrier.init(v_free.index(b), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, out, p_lse, p_top, q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free, turns,
                p_order, p_rows, p_segments, num_q, scale_log2, num_items, num_heads, at_once,
                CONSUMERS, BLOCK, D, STAGES, TMA_OUT, MERGE, RAW, TURNS,
            )),
            (_consume, (
                1, out, p_lse, p_top, q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free, turns,
                p_order, p_rows, p_segments, num_q, scale_log2, num_items, num_heads, at_once,
                CONSUMERS, BLOCK, D, STAGES, TMA_OUT, MERGE, RAW, TURNS,
            )),
            (_produce, (
                d_q, d_k, d_v, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free, p_order, p_rows, p_segments,
                s_qh, s_kh, s_vh, num_items, num_heads, at_once, group, CONSUMERS, BLOCK, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
