"""Attention of any slice mask on one device, as a differentiable function.

Shapes: num_q, num_k tokens; hq, hk heads (hq % hk == 0); d, dv head dims of q/k and of v; n slices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.checks import check_sink, check_tables, check_tensors
from magi_attention.functional.ops import FlexFlashAttention, flex_flash_attn
from magi_attention.functional.precision import in_asked_precision


@in_asked_precision
def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    disable_bwd_dkv_atomic_reduction: bool = False,
    ref_block_size: tuple[int, int] | None = None,
    max_seqlen_q: int | None = None,
    auto_range_merge: bool = False,
    swap_ab: bool = False,
    pack_gqa: bool = False,
    cat_gqa: bool = False,
    sparse_load: bool = False,
    swap_bwd_qk_loop: bool = False,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attention over the cells of a list of slices, differentiable (once) in q, k, v and sink.

    Slice ``s`` lets queries ``q_ranges[s]`` attend keys ``k_ranges[s]``, all or up to a diagonal. With queries ``[q0, q1)`` and
    keys ``[k0, k1)``, cell ``(i, j)`` of that rectangle is attended when:

    ====  ==========  ==========================================
    type  name        condition
    ====  ==========  ==========================================
    0     full        always
    1     causal      ``j - i <= k1 - q1`` (bottom-right aligned)
    2     inv_causal  ``j - i >= k0 - q0`` (top-left aligned)
    3     bi_causal   both
    ====  ==========  ==========================================

    Slices may overlap in queries and in keys, but must not list a cell twice: with ``MAGI_ATTENTION_SANITY_CHECK`` that is a
    ValueError, without it the result is undefined. A query that attends nothing has output 0, lse ``-inf`` and zero gradients.

    Tables on the CPU are read and checked in every call. Those on a GPU are left there, so that the host never waits for them: ranges
    beyond the tensors are cut to them, unless ``MAGI_ATTENTION_SANITY_CHECK`` asks for the same checks as on the CPU. What is made
    of tables is kept for as long as they are, and made anew after a write to them: give the layers of a model the same tensors.

    Under ``torch.compile`` a call is one node of the graph, ``magi_attention::flex_flash_attn``, and its backward another.

    Args:
        q: ``[num_q, hq, d]``, float16, bfloat16, float32 or float64, any strides.
        k: ``[num_k, hk, d]``, of q's dtype and device; ``hq`` is a multiple of ``hk``, and query head ``h`` attends head
            ``h // (hq // hk)``.
        v: ``[num_k, hk, dv]``, likewise.
        q_ranges: ``[n, 2]`` int32 on q's device, half-open.
        k_ranges: ``[n, 2]`` int32 on q's device, half-open.
        attn_type_map: ``[n]`` int32 on q's device, types as above; None: all full.
        sink: logits that join each softmax's denominator and nothing else, of any floating dtype: ``[num_sink, hq]``, or
            ``[num_q, num_sink, hq]`` with ``sink_layout="ssh"``. The lse of a query that attends nothing is then the sinks'.
        sink_layout: "sh" or "ssh".
        softmax_scale: factor of ``q.k``; None: ``1 / sqrt(d)``.
        softcap: above 0, logits become ``softcap * tanh(logits / softcap)`` after scaling. Sinks are not capped.
        deterministic: ask for the same bits from the same inputs. Passed on to the kernel. All kernels give them unasked, except the
            fused backward of the ``hopper`` backend (sm_90), which adds to dq in the order in which its blocks come; where they are
            asked for, ``triton``'s backward takes its place. ``MAGI_ATTENTION_DETERMINISTIC_MODE`` asks for them everywhere.
        sm_margin: multiprocessors to leave to others. Not used.
        disable_fwd_atomic_reduction: Not used: no kernel here reduces its forward with atomics.
        disable_bwd_dkv_atomic_reduction: Not used: no kernel here reduces dk and dv with atomics.
        ref_block_size: tile sizes of the kernel. Not used: kernels choose their own.
        max_seqlen_q: longest q range. Not used: kernels read the ranges.
        auto_range_merge: merge slices of equal q range. Not used: kernels group their work by tiles, merged or not.
        swap_ab: swap the operands of the matrix products. Not used.
        pack_gqa: put the query heads of a kv head in one tile. Not used: kernels decide.
        cat_gqa: concatenate the query heads of a kv head in the backward. Not used: kernels decide.
        sparse_load: gather keys of short ranges into one tile. Not used.
        swap_bwd_qk_loop: loop over keys inside queries in the backward. Not used.
        return_max_logits: whether to return ``max_logits``.

    Returns:
        ``out`` ``[num_q, hq, dv]`` in q's dtype, and ``AttnForwardMeta(lse, max_logits)``, neither of them differentiable:
        ``lse`` ``[num_q, hq]``, float32 (float64 for float64 inputs), natural log of the softmax's denominator, sinks included;
        ``max_logits`` ``[hq]`` in lse's dtype, the largest scaled logit over attended cells before softcap (``-inf`` where a head
        attends nothing), or None where not asked for.

    Raises:
        ValueError: tensors whose shapes, dtypes or devices do not fit each other; ranges that are reversed or out of bounds and
            unknown mask types, where tables are checked; a kernel named by ``MAGI_ATTENTION_BACKEND`` that cannot serve these tensors.
        RuntimeError: differentiating its gradients again.
    """
    check_tensors(q, k, v)
    check_sink(sink, sink_layout, q)
    check_tables(q_ranges, k_ranges, attn_type_map, q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    tables = (q_ranges, k_ranges, attn_type_map)
    attend = flex_flash_attn if torch.compiler.is_compiling() else FlexFlashAttention.apply
    out, lse, max_logits = attend(
        q, k, v, *tables, sink, sink_layout, scale, float(softcap), deterministic, return_max_logits
    )
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits if return_max_logits else None)
