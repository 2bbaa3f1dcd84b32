"""Distributed attention: the executor of a plan. It takes no decisions.

    forward, rank r        cast 0 ─────► cast 1 ─────► ...           rows of stage s + 1 travel
                           host kernel   stage 0       stage 1       while stage s computes
    backward               the same, and the gradients of stage s's keys travel home while stage s + 1 computes

Shapes: num_q, num_k local rows; hq, hk heads; d, dv head dims. Partial results are merged in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magi_attention.comm import all_reduce_max, dsink_all_reduce, group_cast, group_reduce
from magi_attention.functional.sink import apply_sink, sink_gradient
from magi_attention.kernels.interface import AttnSettings, Backend, Partial
from magi_attention.runtime.session import Session


@dataclass(frozen=True)
class ExecutionOptions:
    """How a plan is carried out. None of it changes what is computed, only how exactly and where.

    ``reduce_dtype_forward``, ``reduce_dtype_backward``: dtype in which partial results travel; None is the inputs' dtype.
    ``dsink_reduce_op``: "none", "sum" or "avg", over the ranks' shares of the sink's gradient.
    """

    backend: Backend
    settings: AttnSettings
    high_precision_backward: bool = False
    dsink_reduce_op: str = "none"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, session: Session, options: ExecutionOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out [num_q, hq, dv] in q's dtype, lse [num_q, hq], max_logits [hq] or None)`` of this rank's queries."""
    group, stages, backend = session.key.cp_group, session.rank_plan.stages, options.backend
    arriving = group_cast((k, v), stages[0].exchange, group, label="k/v of stage 0, forward") if stages else None
    needs_merge = bool(stages)
    partial = backend.forward(
        q, k, v, session.host_mask, options.settings, out_dtype=accumulation_dtype(q.dtype) if needs_merge else q.dtype
    )
    for number, (stage, mask) in enumerate(zip(stages, session.stage_masks, strict=True)):
        assert arriving is not None
        stage_k, stage_v = arriving.wait()
        if number + 1 < len(stages):
            label = f"k/v of stage {number + 1}, forward"
            arriving = group_cast((k, v), stages[number + 1].exchange, group, label=label)
        if len(stage.bands):
            partial = backend.forward(q, stage_k, stage_v, mask, options.settings, into=partial)
    out, lse, max_logits = partial
    if sink is not None:
        out, lse = apply_sink(out, lse, sink)
    if max_logits is not None and group is not None:
        max_logits = all_reduce_max(max_logits, group)
    return out.to(q.dtype), lse, max_logits


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    session: Session,
    options: ExecutionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` in the inputs' dtypes, and ``delta [num_q, hq]``, the row sums of ``out * dout``."""
    group, stages, backend = session.key.cp_group, session.rank_plan.stages, options.backend
    arriving = group_cast((k, v), stages[0].exchange, group, label="k/v of stage 0, backward") if stages else None
    wide = accumulation_dtype(q.dtype)
    travelling = wide if options.high_precision_backward else k.dtype
    delta = (out.to(wide) * dout.to(wide)).sum(dim=-1)
    grads = (dout, q, k, v, lse, delta, session.host_mask, options.settings)
    dq, dk, dv = backend.backward(*grads, grad_dtype=wide if stages else q.dtype)
    returning = None
    for number, (stage, mask) in enumerate(zip(stages, session.stage_masks, strict=True)):
        assert arriving is not None
        stage_k, stage_v = arriving.wait()
        if number + 1 < len(stages):
            label = f"k/v of stage {number + 1}, backward"
            arriving = group_cast((k, v), stages[number + 1].exchange, group, label=label)
        if len(stage.bands):
            _, stage_dk, stage_dv = backend.backward(
                dout, q, stage_k, stage_v, lse, delta, mask, options.settings, dq=dq, grad_dtype=travelling
            )
        else:
            stage_dk, stage_dv = torch.zeros_like(stage_k), torch.zeros_like(stage_v)
        if returning is not None:
            returning.wait()
        label = f"dk/dv of stage {number}"
        returning = group_reduce(
            (stage_dk, stage_dv), (dk, dv), stage.exchange, group, transit_dtype=travelling, label=label
        )
    if returning is not None:
        returning.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), delta


class DistributedAttention(torch.autograd.Function):
    """`run_forward` and `run_backward` as one differentiable function of q, k, v and sink."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, session: Session, options: ExecutionOptions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, max_logits = run_forward(q, k, v, sink, session, options)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.session, ctx.options = session, options
        ctx.mark_non_differentiable(*(x for x in (lse, max_logits) if x is not None))
        return out, lse, max_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dq, dk, dv, delta = run_backward(dout, q, k, v, out, lse, ctx.session, ctx.options)
        dsink = None
        if sink is not None:
            dsink = sink_gradient(lse, sink, delta)
            if ctx.session.key.cp_group is not None:
                dsink = dsink_all_reduce(dsink, ctx.options.dsink_reduce_op, ctx.session.key.cp_group)
            dsink = dsink.to(sink.dtype)
        return dq, dk, dv, dsink, None, None


__all__ = ["DistributedAttention", "ExecutionOptions", "Partial", "accumulation_dtype", "run_backward", "run_forward"]
