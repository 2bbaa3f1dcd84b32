"""Distributed attention as operators of torch: what `torch.compile` sees of `calc_attn`. They know a key by its handle.

    magi_attention::distributed_attn             forward, with a formula for its gradient
    magi_attention::distributed_attn_backward    that formula; dlse is None where lse is not used

Every rank must run the same calls in the same order, compiled or not: what is compiled on one rank must be on all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_attention import env
from magi_attention.api.keys import pick_backend
from magi_attention.functional.once_differentiable import refusal
from magi_attention.functional.ops import GRADIENT_VERSION, as_last_contiguous
from magi_attention.kernels.interface import AttnSettings
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.runtime import cache, checks
from magi_attention.runtime.dist_attn import ExecutionOptions, differentiate, run_forward
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.session import Session

_OPTIONS = "Tensor? sink, SymInt handle, float? softmax_scale, float softcap"
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_max_logits, int gradient_version)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: DistAttnRuntimeKey,
    sink: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
) -> tuple[Session, ExecutionOptions]:
    """What stands behind a key, and how a call of `calc_attn` is carried out. ValueError: see there."""
    session = cache.get_session(key)
    checks.check_qkv(q, k, v, session)
    checks.check_sink(sink, q)
    q, k, v = (as_last_contiguous(x) for x in (q, k, v))
    settings = AttnSettings(
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap,
        deterministic=env.deterministic_mode(),
        return_max_logits=return_max_logits,
    )
    options = ExecutionOptions(
        backend=pick_backend(q, k, v, settings),
        settings=settings,
        high_precision_forward=env.forward_high_precision_reduce(),
        high_precision_backward=env.backward_high_precision_reduce(),
        dsink_reduce_op=env.dsink_all_reduce_op(),
    )
    return session, options


@torch.library.custom_op("magi_attention::distributed_attn", mutates_args=(), schema=_FORWARD)
def forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    handle: int,
    softmax_scale: float | None,
    softcap: float,
    return_max_logits: bool,
    gradient_version: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [num_q, hq, dv], lse [num_q, hq], max_logits [hq] or [0])``; see `calc_attn`."""
    session, options = prepare(q, k, v, cache.key_behind(handle), sink, softmax_scale, softcap, return_max_logits)
    q, k, v = (as_last_contiguous(x) for x in (q, k, v))
    out, lse, max_logits = run_forward(q, k, v, sink, session, options)
    return out.contiguous(), lse.contiguous(), lse.new_empty(0) if max_logits is None else max_logits


def distributed_attn(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, of all its inputs but the last."""
    output: tuple[Tensor, Tensor, Tensor] = forward_operator(*inputs, GRADIENT_VERSION)
    return output


@forward_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    (num_q, hq, _), wide = q.shape, accumulation_dtype(q.dtype)
    out, lse = q.new_empty(num_q, hq, v.shape[2]), q.new_empty(num_q, hq, dtype=wide)
    return_max_logits = options[-2]
    return out, lse, q.new_empty(hq if return_max_logits else 0, dtype=wide)


@torch.library.custom_op("magi_attention::distributed_attn_backward", mutates_args=(), schema=_BACKWARD)
def distributed_attn_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    handle: int,
    softmax_scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of the shapes and dtypes of q, k, v, and ``dsink`` of the sink's, or ``[0]``."""
    session, options = prepare(q, k, v, cache.key_behind(handle), sink, softmax_scale, softcap, False)
    q, k, v = (as_last_contiguous(x) for x in (q, k, v))
    dq, dk, dv, dsink = differentiate((dout, dlse), (q, k, v, sink, out, lse), session, options)
    dsink = lse.new_empty(0) if dsink is None else dsink
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dsink.contiguous()


@distributed_attn_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = lse.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sink, *ctx.options = inputs
    out, lse, max_logits = output
    ctx.save_for_backward(q, k, v, out, lse, sink)
    ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sink = ctx.saved_tensors
    # A rank that does not use out takes part in the same exchanges as the others.
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsink = distributed_attn_backward(dout, dlse, q, k, v, out, lse, sink, *ctx.options[:-2])
    return dq, dk, dv, None if sink is None else dsink, *(None,) * 5


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise refusal("calc_attn")


forward_operator.register_autograd(_differentiate, setup_context=_save)
distributed_attn_backward.register_autograd(_refuse)
