"""Attention of any slice mask on one device, as a differentiable function.

Shapes: num_q, num_k tokens; hq, hk heads (hq % hk == 0); d, dv head dims of q/k and of v; n slices.
"""

from __future__ import annotations

from torch import Tensor

import magi_attention.functional.flops  # noqa: F401 - registers formulas, once the operators are there
from magi_attention.common.dtensors import accepts_dtensors
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.tensor_kinds import is_observed
from magi_attention.functional.checks import check_one_mask, check_sink, check_tables, check_tensors
from magi_attention.functional.index_attn import attend_listed_blocks
from magi_attention.functional.masks import Tables, as_saveable, tables_of_mask
from magi_attention.functional.ops import FlexFlashAttention, flex_flash_attn
from magi_attention.functional.precision import in_asked_precision
from magi_attention.kernels.precision import as_autocast_casts
from magi_attention.mask import AttnMask


@accepts_dtensors()
@in_asked_precision
def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor | None = None,
    k_ranges: Tensor | None = None,
    attn_type_map: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
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
    index_attn: bool = False,
    index_attn_indices: Tensor | None = None,
    q_block_size: int = 1,
    k_block_size: int = 1,
    mask: AttnMask | None = None,
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
    ValueError, without it the result is undefined. A query that attends nothing has output 0, lse ``-inf`` and zero gradients,
    whatever the gradients of its output and lse hold, NaN included. With a sink, its lse is the sink's, and the gradient of that lse
    goes to the sink.

    Tables on the CPU are read and checked in every call. Those on a GPU are left there, so that the host never waits for them: ranges
    beyond the tensors are cut to them, unless ``MAGI_ATTENTION_SANITY_CHECK`` asks for the same checks as on the CPU. What is made
    of tables is kept for as long as they are, and made anew after a write to them: give the layers of a model the same tensors. Tables
    made under ``torch.inference_mode`` work, but what is made of them is not kept; under ``torch.compile`` clone them first, because torch
    saves no such tensor for the backward of a graph.

    Under autocast q, k and v are cast to autocast's dtype, float64 excepted, as in torch's own attention; the sink keeps its dtype.

    In place of ranges, a call takes an `AttnMask`, or lists of key blocks (``index_attn_indices``), which may differ between kv heads.

    Under ``torch.compile``, and wherever a dispatch mode is active, a call is one operator, ``magi_attention::flex_flash_attn``, and its
    backward another.

    DTensors q, k, v on one 1-D mesh, all Shard(1) (heads, dividing evenly) or all Replicate(), give DTensors: ``out`` and ``lse``
    placed alike, ``max_logits`` Shard(0). The tables are plain tensors. The sink is a DTensor too, sharded over its heads alike or
    Replicate(). Results of functional collectives are waited for.

    Args:
        q: ``[num_q, hq, d]``, float16, bfloat16, float32 or float64, any strides.
        k: ``[num_k, hk, d]``, of q's dtype and device; ``hq`` is a multiple of ``hk``, and query head ``h`` attends head
            ``h // (hq // hk)``.
        v: ``[num_k, hk, dv]``, likewise.
        q_ranges: ``[n, 2]`` int32 on q's device, half-open. None: the mask is given by ``mask`` or ``index_attn_indices``.
        k_ranges: ``[n, 2]`` int32 on q's device, half-open.
        attn_type_map: ``[n]`` int32 on q's device, types as above; None: all full.
        sink: logits that join each softmax's denominator and nothing else, of any floating dtype: ``[num_sink, hq]``, ``[hq]`` (one
            sink), or ``[num_q, num_sink, hq]`` with ``sink_layout="ssh"``. The lse of a query that attends nothing is then the sinks'.
        sink_layout: "sh" or "ssh".
        softmax_scale: factor of ``q.k``; None: ``1 / sqrt(d)``.
        softcap: above 0, logits become ``softcap * tanh(logits / softcap)`` after scaling. Sinks are not capped. None: 0.
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
        index_attn: Not used: that ``index_attn_indices`` are given says as much.
        index_attn_indices: ``[num_blocks_q, hk, topk]`` int32 on q's device: the blocks of keys that each block of queries attends, with
            all query heads of the kv head. -1 at the end of a list is padding. The last blocks may be shorter. Each kv head is a
            call of its own, over ranges that the host makes of the lists: right, but not fast. A block listed twice is a
            ValueError under ``MAGI_ATTENTION_SANITY_CHECK``, without it the result is undefined. In compiled code and CUDA graphs
            the lists are not read: a block that does not exist is then no error, and attends nothing.
        q_block_size: queries of a block of ``index_attn_indices``.
        k_block_size: keys of a block of ``index_attn_indices``.
        mask: an `AttnMask` of num_q queries and num_k keys. Its tables are made in its first call, and kept as long as it is.

    Returns:
        ``out`` ``[num_q, hq, dv]`` in q's dtype, and ``AttnForwardMeta(lse, max_logits)``. ``lse`` ``[num_q, hq]``: float32 (float64 for
        float64 inputs), natural log of the softmax's denominator, sinks included; differentiable like ``out``, so a z-loss works. A kept
        lse holds the graph and the tensors saved for the backward: keep ``lse.detach()`` where it is only logged. ``max_logits``
        ``[hq]``: in lse's dtype, not differentiable, the largest scaled logit over attended cells before softcap (``-inf`` where a head
        attends nothing), or None where not asked for.

    Raises:
        ValueError: DTensors placed otherwise, and wrapper tensors without memory; tensors whose shapes, dtypes or devices do not fit
            each other; ranges that are reversed or out of bounds and unknown
            mask types, where tables are checked; not exactly one of ranges, ``mask`` and ``index_attn_indices``; indices that
            name no block of keys, or make more than 4,000,000 ranges for a kv head; a kernel named by ``MAGI_ATTENTION_BACKEND`` that
            cannot serve these tensors.
        RuntimeError: differentiating its gradients again.
    """
    q, k, v = as_autocast_casts(q, k, v)
    check_tensors(q, k, v)
    if isinstance(sink, Tensor) and sink.dim() == 1 and sink_layout == "sh":
        sink = sink.unsqueeze(0)
    check_sink(sink, sink_layout, q)
    check_one_mask(q_ranges, k_ranges, attn_type_map, mask, index_attn_indices)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    softcap = 0.0 if softcap is None else float(softcap)
    attend = flex_flash_attn if is_observed(q) else FlexFlashAttention.apply

    def attend_slices(
        q: Tensor, k: Tensor, v: Tensor, tables: Tables, sink: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = attend(
            q, k, v, *as_saveable(*tables), sink, sink_layout, scale, softcap, deterministic, return_max_logits
        )
        return result

    if index_attn_indices is not None:
        blocks = (index_attn_indices, (q_block_size, k_block_size))
        out, lse, max_logits = attend_listed_blocks(attend_slices, q, k, v, sink, *blocks)
    else:
        if mask is not None:
            tables = tables_of_mask(mask, q.shape[0], k.shape[0], q.device)
        else:
            tables = check_tables(q_ranges, k_ranges, attn_type_map, q.device)
        out, lse, max_logits = attend_slices(q, k, v, tables, sink)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits if return_max_logits else None)
