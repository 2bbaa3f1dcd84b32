"""Distributed attention: the executor of a plan. It takes no decisions.

    forward, rank r        cast 0 ─────► cast 1 ─────► ...           rows of stage s + 1 travel
                           host kernel   stage 0       stage 1       while stage s computes
    backward               the same, and the gradients of stage s's keys travel home while stage s + 1 computes
    guests                 queries of other ranks arrive during the host stage, are computed after it, and what came of them
                           travels home during the stages

Shapes: num_q, num_k local rows; hq, hk heads; d, dv head dims. Partial results are merged in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magi_attention.comm import (
    Pending,
    all_reduce_max,
    dsink_all_reduce,
    group_cast,
    group_reduce,
    group_reduce_lse,
)
from magi_attention.common.tensor_kinds import is_observed
from magi_attention.functional.once_differentiable import as_once_differentiable
from magi_attention.functional.ops import as_last_contiguous
from magi_attention.functional.sink import apply_sink, sink_gradient
from magi_attention.kernels.interface import AttnSettings, Backend, KernelMask, Partial
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.kernels.row_dots import row_deltas
from magi_attention.plan import StagePlan
from magi_attention.runtime.session import Session
from magi_attention.runtime.transport import cast_keys, reduce_gradients


@dataclass(frozen=True)
class ExecutionOptions:
    """How a plan is carried out. None of it changes what is computed, only how exactly and where.

    ``high_precision_forward``, ``high_precision_backward``: partial results travel in the accumulation dtype rather than the inputs'.
    ``dsink_reduce_op``: "none", "sum" or "avg", over the ranks' shares of the sink's gradient.
    """

    backend: Backend
    settings: AttnSettings
    high_precision_forward: bool = False
    high_precision_backward: bool = False
    dsink_reduce_op: str = "none"


def remote_stages(
    tensors: Sequence[Tensor], stages: Sequence[StagePlan], masks: Sequence[KernelMask], session: Session, what: str
) -> Iterator[tuple[StagePlan, KernelMask, tuple[Tensor, ...]]]:
    """Each stage once its rows are there. The rows of the next one are asked for before a stage is handed out; those of the first when this
    is made, so make it before the host stage."""

    def ask(number: int) -> Pending[tuple[Tensor, ...]]:
        label = f"{what}, stage {number} of {len(stages)}"
        return cast_keys(tensors, stages[number], session.key.cp_group, label)

    first = ask(0) if stages else None

    def follow() -> Iterator[tuple[StagePlan, KernelMask, tuple[Tensor, ...]]]:
        arriving = first
        for number, (stage, mask) in enumerate(zip(stages, masks, strict=True)):
            assert arriving is not None
            rows = arriving.wait()
            arriving = ask(number + 1) if number + 1 < len(stages) else None
            yield stage, mask, rows

    return follow()


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, session: Session, options: ExecutionOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out [num_q, hq, dv] in q's dtype, lse [num_q, hq], max_logits [hq] or None)`` of this rank's queries."""
    group, part, backend, settings = session.key.cp_group, session.rank_plan, options.backend, options.settings
    wide = accumulation_dtype(q.dtype)
    guests = part.guests
    visiting = None if guests is None else group_cast((q,), guests.exchange, group, label="queries of guests, forward")
    remote = remote_stages((k, v), part.stages, session.stage_masks, session, "k/v, forward")
    needs_merge = bool(part.stages) or guests is not None or sink is not None
    partial = backend.forward(q, k, v, session.host_mask, settings, out_dtype=wide if needs_merge else q.dtype)
    returning = None
    if guests is not None and visiting is not None:
        (guest_q,) = visiting.wait()
        theirs = backend.forward(guest_q, k, v, session.guest_mask, settings)
        returning = group_reduce_lse(
            theirs.out,
            theirs.lse,
            (partial.out, partial.lse),
            guests.exchange,
            group,
            transit_dtype=wide if options.high_precision_forward else q.dtype,
            label="outputs of guests",
        )
        partial = Partial(partial.out, partial.lse, _larger(partial.max_logits, theirs.max_logits))
    for stage, mask, (stage_k, stage_v) in remote:
        if len(stage.bands):
            partial = backend.forward(q, stage_k, stage_v, mask, settings, into=partial)
    if returning is not None:
        returning.wait()
    out, lse, max_logits = partial
    if sink is not None:
        out, lse = apply_sink(out, lse, sink)
    if max_logits is not None and group is not None:
        max_logits = all_reduce_max(max_logits, group)
    return out.to(q.dtype), lse, max_logits


def _larger(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    return None if ours is None or theirs is None else torch.maximum(ours, theirs)


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    session: Session,
    options: ExecutionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` in the inputs' dtypes. ``delta [num_q, hq]``: of `row_deltas`, for this rank's queries."""
    group, part, backend, settings = session.key.cp_group, session.rank_plan, options.backend, options.settings
    wide = accumulation_dtype(q.dtype)
    travelling = wide if options.high_precision_backward else k.dtype
    guests = part.guests
    visiting = None
    if guests is not None:
        visiting = group_cast((q, dout, lse, delta), guests.exchange, group, label="queries of guests, backward")
    stages = part.backward_stages
    remote = remote_stages((k, v), stages, session.backward_stage_masks, session, "k/v, backward")
    merges = bool(stages) or guests is not None
    grad_dtype = wide if merges else q.dtype
    dq, dk, dv = backend.backward(dout, q, k, v, lse, delta, session.host_mask, settings, grad_dtype=grad_dtype)
    returning: list[Pending[None]] = []
    if guests is not None and visiting is not None:
        guest_q, guest_dout, guest_lse, guest_delta = visiting.wait()
        guest_dq, guest_dk, guest_dv = backend.backward(
            guest_dout, guest_q, k, v, guest_lse, guest_delta, session.guest_mask, settings
        )
        dk += guest_dk
        dv += guest_dv
        returning.append(
            group_reduce((guest_dq,), (dq,), guests.exchange, group, transit_dtype=travelling, label="dq of guests")
        )
    for number, (stage, mask, (stage_k, stage_v)) in enumerate(remote):
        if len(stage.bands):
            _, stage_dk, stage_dv = backend.backward(
                dout, q, stage_k, stage_v, lse, delta, mask, settings, dq=dq, grad_dtype=travelling
            )
        else:
            stage_dk, stage_dv = (torch.zeros_like(x, dtype=travelling) for x in (stage_k, stage_v))
        if len(returning) > 1:  # at most two on their way home: what they hold in memory is bounded
            returning.pop(0).wait()
        label = f"dk/dv, stage {number} of {len(stages)}"
        returning.append(reduce_gradients((stage_dk, stage_dv), (dk, dv), stage, group, travelling, label))
    for reduction in returning:
        reduction.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def differentiate(
    grads: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    session: Session,
    options: ExecutionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(dq, dk, dv, dsink)`` in the dtypes of q, k, v and sink.

    ``saved``: ``q, k, v, sink, out, lse``. ``grads``: of out and lse; None where this rank's loss
    does not use it. Ranks may differ in that: the exchanges are the same whatever is None.
    """
    (dout, dlse), (q, k, v, sink, out, lse) = grads, saved
    dout = torch.zeros_like(out) if dout is None else as_last_contiguous(dout)
    delta = row_deltas(out, lse, dout, dlse)
    dq, dk, dv = run_backward(dout, q, k, v, lse, delta, session, options)
    return dq, dk, dv, None if sink is None else sink_share(lse, sink, delta, session, options)


def sink_share(lse: Tensor, sink: Tensor, delta: Tensor, session: Session, options: ExecutionOptions) -> Tensor:
    """This rank's gradient of the sink, in its shape and dtype: its share, or what `dsink_all_reduce` makes of the ranks' shares."""
    dsink = sink_gradient(lse, sink, delta)
    if session.key.cp_group is not None:
        dsink = dsink_all_reduce(dsink, options.dsink_reduce_op, session.key.cp_group)
    return dsink.to(sink.dtype)


class DistributedAttention(torch.autograd.Function):
    """`run_forward` and `run_backward` as one differentiable function of q, k, v and sink."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, session: Session, options: ExecutionOptions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, max_logits = run_forward(q, k, v, sink, session, options)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.session, ctx.options = session, options
        if max_logits is not None:
            ctx.mark_non_differentiable(max_logits)
        ctx.set_materialize_grads(False)
        return out, lse, max_logits

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q, k, v, sink, out, lse = saved
        if is_observed(
            q
        ):  # the operator of the layer above, so that a dispatch mode sees a backward whose forward it did not
            dout = torch.zeros_like(out) if dout is None else dout
            settings = ctx.options.settings
            handle, options = ctx.session.key.handle, (settings.softmax_scale, settings.softcap)
            operator = torch.ops.magi_attention.distributed_attn_backward
            dq, dk, dv, dsink = operator(dout, dlse, q, k, v, out, lse, sink, handle, *options)
            return dq, dk, dv, None if sink is None else dsink, None, None
        with torch.no_grad():
            grads = differentiate((dout, dlse), saved, ctx.session, ctx.options)
        return *as_once_differentiable("calc_attn", grads, (dout, dlse, q, k, v, sink)), None, None
