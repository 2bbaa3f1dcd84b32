"""The fused backward: five products a block, dk and dv kept in registers, dq added up in global memory by the copy engine.

A program owns (128 keys, kv head) and walks the blocks of queries that attend them, for each query head of the group, in the order that
`walks` draws. Scores are computed transposed, ``[k, q]``, so that probabilities and their gradients are the left sides of dv's and dk's
products as they come; only dq's product needs them from shared memory. Blocks of dq are added in the order in which programs reach
them: not deterministic.
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

from magi_attention.kernels.hopper.steps import load_segment, locate, mask_scores, reduce_add
from magi_attention.kernels.hopper.walks import place_blocks


@gluon.jit
def _produce(
    d_q, d_k, d_v, d_do, d_lse, d_delta, q_s, k_s, v_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, free,
    p_order, p_rows, p_segments, s_qh, s_kh, s_vh, s_doh, s_lse, num_kv_heads, at_once, at_a_time, group,
    KEYS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, IN_STEP: gl.constexpr,
):  # fmt: skip
    num_tiles = gl.num_programs(0) // num_kv_heads
    rank, kv_head = locate(gl.program_id(0), num_tiles, num_kv_heads, at_once)
    is_late = gl.program_id(0) % (num_tiles * at_once) >= at_a_time
    tile = gl.load(p_order + rank)
    mbarrier.expect(kv_full, d_k.block_type.nbytes + d_v.block_type.nbytes)
    tma.async_copy_global_to_shared(d_k, [tile * KEYS, kv_head * s_kh], kv_full, k_s.index(0))
    tma.async_copy_global_to_shared(d_v, [tile * KEYS, kv_head * s_vh], kv_full, v_s.index(0))
    step = 0
    first_at = gl.load(p_rows + tile)
    last_at = gl.load(p_rows + tile + 1) - 1
    for outer in range(1 if IN_STEP else group):
        for segment in range(first_at, last_at + 1):
            at = gl.where(is_late, segment, first_at + last_at - segment) if IN_STEP else segment
            begin, end, origin, sign = place_blocks(p_segments + at * 8, is_late, BLOCK, IN_STEP)
            for x in range(begin, end, BLOCK):
                for inner in range(group if IN_STEP else 1):
                    m = origin + sign * x
                    head = kv_head * group + outer + inner
                    slot = step % STAGES
                    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
                    mbarrier.expect(q_full.index(slot), d_q.block_type.nbytes + d_lse.block_type.nbytes)
                    tma.async_copy_global_to_shared(d_q, [m, head * s_qh], q_full.index(slot), q_s.index(slot))
                    tma.async_copy_global_to_shared(d_lse, [head * s_lse + m], q_full.index(slot), lse_s.index(slot))
                    mbarrier.expect(do_full.index(slot), d_do.block_type.nbytes + d_delta.block_type.nbytes)
                    tma.async_copy_global_to_shared(d_do, [m, head * s_doh], do_full.index(slot), do_s.index(slot))
                    tma.async_copy_global_to_shared(
                        d_delta, [head * s_lse + m], do_full.index(slot), delta_s.index(slot)
                    )
                    step += 1


@gluon.jit
def _multiply_dq(INDEX: gl.constexpr, ds, k_s, zero, BLOCK: gl.constexpr):
    """A consumer's part of dq ``[64, columns]``, under way, from all keys: half of the columns of 64 queries, or 64 of 128 queries."""
    if BLOCK == 64:
        COLUMNS: gl.constexpr = zero.type.shape[1]
        return warpgroup_mma(
            ds.permute((1, 0)), k_s.slice(INDEX * COLUMNS, COLUMNS, dim=1), zero, use_acc=False, is_async=True
        )
    else:
        return warpgroup_mma(ds.slice(INDEX * 64, 64, dim=1).permute((1, 0)), k_s, zero, use_acc=False, is_async=True)


@gluon.jit
def _add_dq(INDEX: gl.constexpr, d_dq, staged, m, column, BLOCK: gl.constexpr):
    if BLOCK == 64:
        reduce_add(d_dq, [m, column + INDEX * d_dq.block_type.shape[1]], staged)
    else:
        reduce_add(d_dq, [m + INDEX * 64, column], staged)


@gluon.jit
def _consume(
    INDEX: gl.constexpr, d_dq, p_dk, p_dv, q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, dq_s,
    kv_full, q_full, do_full, free, ds_full, p_order, p_rows, p_segments, num_k, scale, scale_log2,
    num_kv_heads, at_once, at_a_time, group, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, IN_STEP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])  # [k, q]
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # [k, d]
    # A consumer computes its part of dq from all keys: half of the columns of 64 queries, or 64 of 128 queries.
    COLUMNS: gl.constexpr = D // 2 if BLOCK == ROWS else D
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])  # [q, d]
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=by_key, k_width=2)
    of_query: gl.constexpr = gl.SliceLayout(0, scores)
    num_tiles = gl.num_programs(0) // num_kv_heads
    rank, kv_head = locate(gl.program_id(0), num_tiles, num_kv_heads, at_once)
    is_late = gl.program_id(0) % (num_tiles * at_once) >= at_a_time
    tile = gl.load(p_order + rank)
    row = (tile * 2 + INDEX) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, scores))
    # Keys behind the last are zeros: their scores would be 0, and exp(0 - lse) may be infinite.
    ragged = (tile + 1) * 2 * ROWS > num_k
    dk = gl.zeros([ROWS, D], gl.float32, layout=by_key)
    dv = gl.zeros([ROWS, D], gl.float32, layout=by_key)
    zero = gl.zeros([ROWS, BLOCK], gl.float32, layout=scores)
    zero_dq = gl.zeros([ROWS, COLUMNS], gl.float32, layout=by_query)
    mbarrier.wait(kv_full, 0)
    step = 0
    last_m = 0
    last_head = 0
    first_at = gl.load(p_rows + tile)
    last_at = gl.load(p_rows + tile + 1) - 1
    for outer in range(1 if IN_STEP else group):
        for segment in range(first_at, last_at + 1):
            at = gl.where(is_late, segment, first_at + last_at - segment) if IN_STEP else segment
            begin, end, origin, sign = place_blocks(p_segments + at * 8, is_late, BLOCK, IN_STEP)
            inner_begin = gl.load(p_segments + at * 8 + 2)
            inner_end = gl.where(ragged, inner_begin, gl.load(p_segments + at * 8 + 3))
            for x in range(begin, end, BLOCK):
                for inner in range(group if IN_STEP else 1):
                    m = origin + sign * x
                    head = kv_head * group + outer + inner
                    slot = step % STAGES
                    parity = (step // STAGES) & 1
                    q = q_s.index(slot)
                    do = do_s.index(slot)
                    # Always 0, but not to the compiler: it would compute each operand's address before the loop, and spill them.
                    keys = step >> 30
                    k = k_s.index(keys).slice(INDEX * ROWS, ROWS, dim=0)
                    v = v_s.index(keys).slice(INDEX * ROWS, ROWS, dim=0)
                    mbarrier.wait(q_full.index(slot), parity)
                    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                    mbarrier.wait(do_full.index(slot), parity)
                    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    if (m < inner_begin) | (m + BLOCK > inner_end):
                        # Loaded here and not before the loop, where registers are short.
                        s = mask_scores(s, m, row, load_segment(p_segments, at), BLOCK, scores)
                    p = gl.exp2(s * scale_log2 - lse_s.index(slot).load(of_query)[None, :])
                    b_p = p.to(q_s.dtype)
                    dp, p = warpgroup_mma_wait(0, deps=(dp, p))
                    ds = (p * (dp - delta_s.index(slot).load(of_query)[None, :])).to(q_s.dtype)

                    # dq of the step before, so that neither consumer waits for the other's half of this one's.
                    mbarrier.wait(ds_full.index((step + 1) % 2), ((step - 1) // 2) & 1, pred=step > 0)
                    dq = _multiply_dq(INDEX, ds_s.index((step + 1) % 2), k_s.index(keys), zero_dq, BLOCK)
                    dv = warpgroup_mma(gl.convert_layout(b_p, left), do, dv, is_async=True)
                    dk = warpgroup_mma(gl.convert_layout(ds, left), q, dk, is_async=True)
                    ds_s.index(step % 2).slice(INDEX * ROWS, ROWS, dim=0).store(ds)
                    dq = warpgroup_mma_wait(2, deps=(dq,))
                    staged = dq_s.index(INDEX * 2 + step % 2)
                    staged.store(dq * scale)
                    fence_async_shared()
                    # The other tile of dq was read, for all threads behind the barrier: the next step may write it.
                    tma.store_wait(0)
                    gl.thread_barrier()
                    mbarrier.arrive(ds_full.index(step % 2), count=1)
                    if step > 0:
                        _add_dq(INDEX, d_dq, staged, last_m, last_head * D, BLOCK)
                    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
                    mbarrier.arrive(free.index(slot), count=1)
                    last_m = m
                    last_head = head
                    step += 1
    mbarrier.wait(ds_full.index((step + 1) % 2), ((step - 1) // 2) & 1)
    dq = _multiply_dq(INDEX, ds_s.index((step + 1) % 2), k_s.index(step >> 30), zero_dq, BLOCK)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    staged = dq_s.index(INDEX * 2 + step % 2)
    staged.store(dq * scale)
    fence_async_shared()
    gl.thread_barrier()
    _add_dq(INDEX, d_dq, staged, last_m, last_head * D, BLOCK)
    o_row = (tile * 2 + INDEX) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, by_key))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, by_key))
    o_rows = ((o_row.to(gl.int64) * num_kv_heads + kv_head) * D)[:, None] + column[None, :]
    m_rows = (o_row < num_k)[:, None] & (column < D)[None, :]
    gl.store(p_dk + o_rows, (dk * scale).to(p_dk.dtype.element_ty), mask=m_rows)
    gl.store(p_dv + o_rows, dv.to(p_dv.dtype.element_ty), mask=m_rows)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "s_qh",
        "s_kh",
        "s_vh",
        "s_doh",
        "s_lse",
        "num_k",
        "num_kv_heads",
        "at_once",
        "at_a_time",
        "group",
    ]
)
def backward_kernel(
    d_q, d_k, d_v, d_do, d_lse, d_delta, d_dq, p_dk, p_dv, p_order, p_rows, p_segments,
    s_qh, s_kh, s_vh, s_doh, s_lse, num_k, scale, scale_log2, num_kv_heads, at_once, at_a_time, group,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, IN_STEP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = 128
    k_s = gl.allocate_shared_memory(d_k.dtype, [1, KEYS, D], d_k.layout)
    v_s = gl.allocate_shared_memory(d_v.dtype, [1, KEYS, D], d_v.layout)
    q_s = gl.allocate_shared_memory(d_q.dtype, [STAGES, BLOCK, D], d_q.layout)
    do_s = gl.allocate_shared_memory(d_do.dtype, [STAGES, BLOCK, D], d_do.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], d_lse.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], d_delta.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK], d_q.dtype)
    ds_s = gl.allocate_shared_memory(d_q.dtype, [2, KEYS, BLOCK], ds_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [4, 64, d_dq.block_type.shape[1]], d_dq.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for b in gl.static_range(STAGES):
        mbarrier.init(q_full.index(b), count=1)
        mbarrier.init(do_full.index(b), count=1)
        mbarrier.init(free.index(b), count=2)
    for b in gl.static_range(2):
        mbarrier.init(ds_full.index(b), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_produce, (
                d_q, d_k, d_v, d_do, d_lse, d_delta, q_s, k_s, v_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, free,
                p_order, p_rows, p_segments, s_qh, s_kh, s_vh, s_doh, s_lse, num_kv_heads, at_once, at_a_time, group,
                KEYS, BLOCK, STAGES, IN_STEP,
            )),
            (_consume, (
                0, d_dq, p_dk, p_dv, q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, dq_s,
                kv_full, q_full, do_full, free, ds_full, p_order, p_rows, p_segments, num_k, scale, scale_log2,
                num_kv_heads, at_once, at_a_time, group, BLOCK, D, STAGES, IN_STEP,
            )),
            (_consume, (
                1, d_dq, p_dk, p_dv, q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, dq_s,
                kv_full, q_full, do_full, free, ds_full, p_order, p_rows, p_segments, num_k, scale, scale_log2,
                num_kv_heads, at_once, at_a_time, group, BLOCK, D, STAGES, IN_STEP,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
