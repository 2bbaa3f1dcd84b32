"""Attention of any slice mask on one device, as a differentiable function.

Shapes: num_q, num_k tokens; hq, hk heads (hq % hk == 0); d, dv head dims of q/k and of v; n slices.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magi_attention import env
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional.checks import check_sink, check_slices, check_tensors
from magi_attention.functional.sink import apply_sink, sink_gradient
from magi_attention.kernels.interface import AttnSettings, Backend, KernelMask
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.kernels.registry import pick
from magi_attention.mask.bands import Ints, bands_from_slices, check_disjoint


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
        deterministic: ask for the same bits from the same inputs. Passed on to the kernel; the kernels of this package are
            deterministic either way. ``MAGI_ATTENTION_DETERMINISTIC_MODE`` asks for it everywhere.
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
        ValueError: tensors whose shapes, dtypes or devices do not fit each other; ranges that are reversed or out of bounds; an
            unknown mask type; a kernel named by ``MAGI_ATTENTION_BACKEND`` that cannot serve these tensors.
        RuntimeError: differentiating its gradients again.
    """
    check_tensors(q, k, v)
    check_sink(sink, sink_layout, q)
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    slices = check_slices(q_ranges, k_ranges, attn_type_map, q, k)
    mask = _kernel_mask(*(table.tobytes() for table in slices), q.shape[0], k.shape[0])
    if env.sanity_check():
        check_disjoint(mask.bands)
    settings = AttnSettings(
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        softcap=float(softcap),
        deterministic=deterministic or env.deterministic_mode(),
        return_max_logits=return_max_logits,
    )
    backend = pick(q, k, v, settings, name="reference" if env.sdpa_backend() else env.backend())
    out, lse, max_logits = _FlexFlashAttention.apply(q, k, v, sink, sink_layout, mask, settings, backend)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits)


@lru_cache(maxsize=16)
def _kernel_mask(q_ranges: bytes, k_ranges: bytes, types: bytes, num_q: int, num_k: int) -> KernelMask:
    """The mask of int64 tables given as bytes. The layers of a model ask for the same few masks over and over."""
    q_table, k_table, type_table = (np.frombuffer(table, np.int64) for table in (q_ranges, k_ranges, types))
    bands: Ints = bands_from_slices(q_table.reshape(-1, 2), k_table.reshape(-1, 2), type_table)
    return KernelMask(bands, num_q, num_k)


class _FlexFlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        sink_layout: str,
        mask: KernelMask,
        settings: AttnSettings,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = _as_last_contiguous(q), _as_last_contiguous(k), _as_last_contiguous(v)
        # Sinks rescale the output: it is rounded to q's dtype only after that.
        out_dtype = q.dtype if sink is None else accumulation_dtype(q.dtype)
        out, lse, max_logits = backend.forward(q, k, v, mask, settings, out_dtype=out_dtype)
        if sink is not None:
            out, lse = apply_sink(out, lse, sink, sink_layout)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.call = sink_layout, mask, settings, backend
        ctx.mark_non_differentiable(*(x for x in (lse, max_logits) if x is not None))
        ctx.set_materialize_grads(False)
        return out, lse, max_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 8
        q, k, v, sink, out, lse = ctx.saved_tensors
        sink_layout, mask, settings, backend = ctx.call
        dout = _as_last_contiguous(dout)
        delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(dim=-1)
        dq, dk, dv = backend.backward(dout, q, k, v, lse, delta, mask, settings, grad_dtype=q.dtype)
        dsink = None if sink is None else sink_gradient(lse, sink, delta, sink_layout).to(sink.dtype)
        return dq, dk, dv, dsink, None, None, None, None


def _as_last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
