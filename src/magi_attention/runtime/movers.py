"""dispatch, undispatch and roll of eager programs: differentiable, linear, each the adjoint of another.

    dispatch        gradient: undispatch
    undispatch      gradient: dispatch or, where the ranks' gradients are to be summed, dispatch_sum
    dispatch_sum    gradient: undispatch
    roll            gradient: the roll back

Each is an autograd function, which costs the host little, or the operator of `runtime.mover_ops` where somebody looks on. That is decided
for a forward and for its backward apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.common.tensor_kinds import is_observed
from magi_attention.runtime import mover_ops
from magi_attention.runtime.session import Session
from magi_attention.runtime.shard import gather_global, reduce_local, roll_rows, take_local_rows


def dispatch(x: Tensor, session: Session, role: AttnRole, pad_value: float) -> Tensor:
    """This rank's rows ``[num_local_rows, ...]`` of the global ``[total_seqlen, ...]``."""
    if is_observed(x):
        return mover_ops.dispatch(x, *_known(session, role), pad_value)  # type: ignore[no-any-return]
    return _Dispatch.apply(x, session, role, pad_value)  # type: ignore[no-any-return]


def undispatch(x: Tensor, session: Session, role: AttnRole, is_partial_grad: bool) -> Tensor:
    """The global ``[total_seqlen, ...]`` of the ranks' rows, on every rank."""
    if is_observed(x):
        handle, _, of_keys = _known(session, role)
        total = session.layout(role).total_seqlen
        return mover_ops.undispatch(x, handle, total, of_keys, is_partial_grad)  # type: ignore[no-any-return]
    return _Undispatch.apply(x, session, role, is_partial_grad)  # type: ignore[no-any-return]


def dispatch_sum(x: Tensor, session: Session, role: AttnRole) -> Tensor:
    """This rank's rows of the sum of the ranks' global tensors; padding rows 0."""
    if is_observed(x):
        return mover_ops.dispatch_sum(x, *_known(session, role))  # type: ignore[no-any-return]
    return _DispatchSum.apply(x, session, role)  # type: ignore[no-any-return]


def roll(x: Tensor, session: Session, role: AttnRole, shift: int) -> Tensor:
    """``torch.roll`` by ``shift`` of the global tensor along its first axis, on this rank's rows."""
    if is_observed(x):
        handle, _, of_keys = _known(session, role)
        return mover_ops.roll(x, handle, shift, of_keys)  # type: ignore[no-any-return]
    return _Roll.apply(x, session, role, shift)  # type: ignore[no-any-return]


def _known(session: Session, role: AttnRole) -> tuple[int, int, bool]:
    """``(handle, num_local_rows, of_keys)``, as the operators take them."""
    rows = session.layout(role).num_rows[session.key.cp_rank]
    return session.key.handle, int(rows), role != AttnRole.QUERY


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session, role: AttnRole, pad_value: float) -> Tensor:
        ctx.session, ctx.role = session, role
        return take_local_rows(x, session, role, pad_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return undispatch(grad, ctx.session, ctx.role, False), None, None, None


class _Undispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, session: Session, role: AttnRole, is_partial_grad: bool) -> Tensor:
        ctx.session, ctx.role, ctx.is_partial_grad = session, role, is_partial_grad
        return gather_global(local, session, role)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.is_partial_grad:
            return dispatch_sum(grad, ctx.session, ctx.role), None, None, None
        return dispatch(grad, ctx.session, ctx.role, 0.0), None, None, None


class _DispatchSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, session: Session, role: AttnRole) -> Tensor:
        ctx.session, ctx.role = session, role
        return reduce_local(x, session, role)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return undispatch(grad, ctx.session, ctx.role, True), None, None


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, session: Session, role: AttnRole, shift: int) -> Tensor:
        ctx.session, ctx.role, ctx.shift = session, role, shift
        return roll_rows(local, session, role, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return roll(grad, ctx.session, ctx.role, -ctx.shift), None, None, None
