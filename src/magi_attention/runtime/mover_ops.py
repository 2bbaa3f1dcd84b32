"""Rows between the global tensor and the shards as operators of torch: what graphs and dispatch modes see of them.

    magi_attention::dispatch       global to local; its gradient is undispatch
    magi_attention::undispatch     local to global on every rank; its gradient is dispatch or, of a partial gradient, dispatch_sum
    magi_attention::dispatch_sum   this rank's rows of the sum of the ranks' global tensors; its gradient is undispatch
    magi_attention::roll           a permutation of the global rows; its gradient is the roll back

All are linear, so that gradients of gradients are made of them too. They know a key by its handle, and are told how many rows come of
them, because a handle may be a symbol where a graph is made. Every rank must run the same calls in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.runtime import cache, checks
from magi_attention.runtime.session import Session
from magi_attention.runtime.shard import gather_global, reduce_local, roll_rows, take_local_rows

_DISPATCH = "(Tensor x, SymInt handle, SymInt num_local_rows, bool of_keys, Scalar pad_value) -> Tensor"
_UNDISPATCH = "(Tensor x, SymInt handle, SymInt total_seqlen, bool of_keys, bool is_partial_grad) -> Tensor"
_DISPATCH_SUM = "(Tensor x, SymInt handle, SymInt num_local_rows, bool of_keys) -> Tensor"
_ROLL = "(Tensor x, SymInt handle, SymInt shift, bool of_keys) -> Tensor"


def _behind(handle: int, of_keys: bool) -> tuple[Session, AttnRole]:
    return cache.get_session(cache.key_behind(handle)), AttnRole.KEY if of_keys else AttnRole.QUERY


def _empty(x: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, *x.shape[1:])


@torch.library.custom_op("magi_attention::dispatch", mutates_args=(), schema=_DISPATCH)
def dispatch(x: Tensor, handle: int, num_local_rows: int, of_keys: bool, pad_value: float) -> Tensor:
    """``[num_local_rows, ...]``; see `magi_attention.api.dispatch`."""
    session, role = _behind(handle, of_keys)
    checks.check_global_rows(x, session, role)
    return take_local_rows(x, session, role, pad_value).contiguous()


@dispatch.register_fake
def _(x: Tensor, handle: int, num_local_rows: int, of_keys: bool, pad_value: float) -> Tensor:
    return _empty(x, num_local_rows)


@torch.library.custom_op("magi_attention::undispatch", mutates_args=(), schema=_UNDISPATCH)
def undispatch(x: Tensor, handle: int, total_seqlen: int, of_keys: bool, is_partial_grad: bool) -> Tensor:
    """``[total_seqlen, ...]``; see `magi_attention.api.undispatch`."""
    session, role = _behind(handle, of_keys)
    checks.check_local_rows(x, session, role, "undispatch")
    return gather_global(x, session, role).contiguous()


@undispatch.register_fake
def _(x: Tensor, handle: int, total_seqlen: int, of_keys: bool, is_partial_grad: bool) -> Tensor:
    return _empty(x, total_seqlen)


@torch.library.custom_op("magi_attention::dispatch_sum", mutates_args=(), schema=_DISPATCH_SUM)
def dispatch_sum(x: Tensor, handle: int, num_local_rows: int, of_keys: bool) -> Tensor:
    """``[num_local_rows, ...]``, padding rows 0."""
    session, role = _behind(handle, of_keys)
    checks.check_global_rows(x, session, role)
    return reduce_local(x, session, role).contiguous()


@dispatch_sum.register_fake
def _(x: Tensor, handle: int, num_local_rows: int, of_keys: bool) -> Tensor:
    return _empty(x, num_local_rows)


@torch.library.custom_op("magi_attention::roll", mutates_args=(), schema=_ROLL)
def roll(x: Tensor, handle: int, shift: int, of_keys: bool) -> Tensor:
    """``torch.roll`` of the global rows along their first axis; see `magi_attention.api.roll`."""
    session, role = _behind(handle, of_keys)
    checks.check_local_rows(x, session, role, "roll")
    return roll_rows(x, session, role, shift).contiguous()


@roll.register_fake
def _(x: Tensor, handle: int, shift: int, of_keys: bool) -> Tensor:
    return _empty(x, x.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.num_rows = x.shape[0]


def _differentiate_dispatch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    handle, _, of_keys, _ = ctx.options
    return undispatch(grad, handle, ctx.num_rows, of_keys, False), None, None, None, None


def _differentiate_undispatch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    handle, _, of_keys, is_partial_grad = ctx.options
    if is_partial_grad:
        return dispatch_sum(grad, handle, ctx.num_rows, of_keys), None, None, None, None
    return dispatch(grad, handle, ctx.num_rows, of_keys, 0.0), None, None, None, None


def _differentiate_dispatch_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    handle, _, of_keys = ctx.options
    return undispatch(grad, handle, ctx.num_rows, of_keys, True), None, None, None


def _differentiate_roll(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    handle, shift, of_keys = ctx.options
    return roll(grad, handle, -shift, of_keys), None, None, None


dispatch.register_autograd(_differentiate_dispatch, setup_context=_save)
undispatch.register_autograd(_differentiate_undispatch, setup_context=_save)
dispatch_sum.register_autograd(_differentiate_dispatch_sum, setup_context=_save)
roll.register_autograd(_differentiate_roll, setup_context=_save)
