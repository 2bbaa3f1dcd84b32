"""What is done with a key: rows to their ranks and back, and attention between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import magi_attention.api.flops  # noqa: F401 - registers formulas
from magi_attention.api.ops import distributed_attn, prepare
from magi_attention.common.dtensors import accepts_dtensors, move_rows
from magi_attention.common.enum import AttnRole
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.tensor_kinds import is_dtensor, is_observed, is_plain, settled
from magi_attention.functional.ops import as_last_contiguous
from magi_attention.functional.precision import in_asked_precision
from magi_attention.kernels.precision import as_autocast_casts
from magi_attention.runtime import cache, checks, mover_ops, movers
from magi_attention.runtime.dist_attn import DistributedAttention
from magi_attention.runtime.group import group_device
from magi_attention.runtime.key import DistAttnRuntimeKey


def dispatch(
    x: Tensor, key: DistAttnRuntimeKey, pad_value: float = 0.0, *, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """This rank's rows of a global tensor.

    Args:
        x: ``[total_seqlen, ...]``, the same on every rank. A DTensor must have whole rows on every rank of its 1-D mesh: Replicate(), or
            Shard of another axis.
        key: made for these rows.
        pad_value: what padding rows hold.
        attn_role: QUERY, or KEY or VALUE for the k side, which differs under ``is_same_source=False``.

    Returns:
        ``[num_local_rows, ...]``: the rank's chunks in ascending order, padding included. Differentiable; the gradient of ``x`` is whole on
        every rank.

    Raises:
        ValueError: another number of rows, a DTensor placed otherwise, a wrapper tensor without memory, or a key behind which no plan
            stands.
    """
    if not is_plain(x):
        x = settled("x", x)
        if is_dtensor(x):
            return _of_dtensor(x, key, lambda rows: dispatch(rows, key, pad_value, attn_role=attn_role))
    role = checks.check_role(attn_role)
    if torch.compiler.is_compiling():
        of_keys, num_rows, _ = _known_rows(key, role)
        local: Tensor = mover_ops.dispatch(x, key.handle, num_rows, of_keys, pad_value)
        return local
    session = cache.get_session(key)
    checks.check_global_rows(x, session, role)
    return movers.dispatch(x, session, role, pad_value)


def undispatch(
    x: Tensor, key: DistAttnRuntimeKey, is_partial_grad: bool = False, *, attn_role: AttnRole = AttnRole.QUERY
) -> Tensor:
    """The global tensor, on every rank, of the ranks' rows.

    Args:
        x: ``[num_local_rows, ...]`` as `dispatch` gave them, DTensors too.
        key: the key they were dispatched with.
        is_partial_grad: False where every rank computes the same loss of the result: backward keeps this rank's rows of the
            gradient. True where each rank's loss is its own share: the ranks' gradients are summed.
        attn_role: see `dispatch`.

    Returns:
        ``[total_seqlen, ...]`` without padding. Differentiable.

    Raises:
        ValueError: another number of rows, a DTensor placed otherwise, a wrapper tensor without memory, or a key behind which no plan
            stands.
    """
    if not is_plain(x):
        x = settled("x", x)
        if is_dtensor(x):
            return _of_dtensor(x, key, lambda rows: undispatch(rows, key, is_partial_grad, attn_role=attn_role))
    role = checks.check_role(attn_role)
    if torch.compiler.is_compiling():
        of_keys, _, total = _known_rows(key, role)
        whole: Tensor = mover_ops.undispatch(x, key.handle, total, of_keys, is_partial_grad)
        return whole
    session = cache.get_session(key)
    checks.check_local_rows(x, session, role, "undispatch")
    return movers.undispatch(x, session, role, is_partial_grad)


def roll(x: Tensor, shift: int, dim: int, key: DistAttnRuntimeKey, *, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
    """``torch.roll`` of the global tensor along its tokens, done on the dispatched rows by exchanging those that change rank.

    Args:
        x: local rows, with ``num_local_rows`` along ``dim``; DTensors as `dispatch` takes them.
        shift: by how many tokens; row ``i`` goes to ``(i + shift) % total_seqlen``. For next-token labels, -1.
        dim: the axis of tokens.
        key: the key they were dispatched with.
        attn_role: see `dispatch`.

    Returns:
        As ``x``. Padding rows are left as they are. Differentiable.

    Raises:
        ValueError: another number of rows along ``dim``, a DTensor placed otherwise, a wrapper tensor without memory, or a key behind
            which no plan stands.
    """
    role = checks.check_role(attn_role)
    shift = checks.as_int("shift", shift, what="an int, by how many tokens")
    dim = checks.as_int("dim", dim, what="an axis of x, an int")
    if not isinstance(x, Tensor) or not -x.dim() <= dim < x.dim():
        axes = f"[{-x.dim()}, {x.dim()})" if isinstance(x, Tensor) else "a tensor's range"
        raise ValueError(f"dim must be an axis of x, in {axes}, got {dim}")
    if not is_plain(x):
        x = settled("x", x)
        if is_dtensor(x):
            rows = x.movedim(dim, 0)
            return _of_dtensor(rows, key, lambda rows: roll(rows, shift, 0, key, attn_role=attn_role)).movedim(0, dim)
    moved = x.movedim(dim, 0)
    if torch.compiler.is_compiling():
        of_keys, _, _ = _known_rows(key, role)
        rolled: Tensor = mover_ops.roll(moved, key.handle, shift, of_keys)
        return rolled.movedim(0, dim)
    session = cache.get_session(key)
    checks.check_local_rows(moved, session, role, "roll", f"x, with its axis {dim} first,")
    return movers.roll(moved, session, role, shift).movedim(0, dim)


def _known_rows(key: DistAttnRuntimeKey, role: AttnRole) -> tuple[bool, int, int]:
    """``(of_keys, num_local_rows, total_seqlen)`` of a side, as a graph can know them: from the key alone."""
    if not isinstance(key, DistAttnRuntimeKey) or key.num_local_rows is None:
        raise ValueError(
            "key must be a DistAttnRuntimeKey made by magi_attn_flex_key or magi_attn_varlen_key, for which there is a plan"
        )
    rows_q, rows_k = key.num_local_rows
    return (False, rows_q, key.total_seqlen_q) if role == AttnRole.QUERY else (True, rows_k, key.total_seqlen_k)


def _of_dtensor(x: Any, key: DistAttnRuntimeKey, move: Callable[[Tensor], Tensor]) -> Tensor:
    return move_rows(x, move, lambda mesh: _check_mesh(mesh, key))


def _check_mesh(mesh: Any, key: object) -> None:
    """ValueError where DTensors are spread over ranks that the key spreads its tokens over."""
    if not isinstance(key, DistAttnRuntimeKey) or key.cp_group is None:
        return
    ours, theirs = (set(dist.get_process_group_ranks(group)) for group in (key.cp_group, mesh.get_group()))
    shared = sorted(ours & theirs)
    if len(shared) > 1:
        raise ValueError(
            "a mesh of DTensors must not spread their heads over the ranks that the key spreads its tokens over, got ranks "
            f"{shared} in both; pass what to_local() of each gives if their rows are this rank's, or use the mesh of another dimension, "
            "such as tensor parallel"
        )


def get_position_ids(key: DistAttnRuntimeKey, *, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
    """``[num_local_rows]`` int64: the global index of every local row; padding rows get the last valid one.

    On the current GPU for a group on NCCL, else on the CPU.

    Raises:
        ValueError: a key behind which no plan stands.
    """
    session, role = cache.get_session(key), checks.check_role(attn_role)
    positions = session.positions(role, group_device(session.key.cp_group))
    return positions.clamp(max=max(session.layout(role).total_seqlen - 1, 0))


@accepts_dtensors(lambda mesh, given: _check_mesh(mesh, given.get("key")))
@in_asked_precision
def calc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: DistAttnRuntimeKey,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attention of this rank's queries to all keys that the mask gives them, wherever they are.

    Args:
        q: ``[num_local_rows_q, num_heads_q, head_dim]``.
        k, v: ``[num_local_rows_k, num_heads_kv, head_dim]``; ``v`` may have a head_dim of its own.
        key: the key these rows were dispatched with, or one made for a new mask after dispatch.
        sink: ``[num_sink, num_heads_q]`` learnable logits, replicated, that join the softmax's denominator and nothing else. Its
            gradient is this rank's share, unless MAGI_ATTENTION_DSINK_ALL_REDUCE_OP is ``sum`` or ``avg``.
        softmax_scale: None is ``head_dim ** -0.5``.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 is none.
        return_max_logits: also the largest scaled logit of each head, before softcap, over all ranks.

    Returns:
        ``out`` ``[num_local_rows_q, num_heads_q, head_dim of v]`` in q's dtype, and ``AttnForwardMeta(lse [num_local_rows_q,
        num_heads_q], max_logits [num_heads_q] or None)``. A query that attends nothing (padding too) has output 0, lse -inf and zero
        gradients, whatever the gradients of its output and lse hold. With a sink, its lse is the sink's, and the gradient of that lse
        goes to the sink: mask padding rows out of a loss of lse, or take the lse from ``undispatch(meta.lse, key)``, which drops them.
        ``out`` and ``lse`` are differentiable (once) in q, k, v and sink; a rank's loss may use either or both. A kept ``lse`` holds
        the graph and the tensors saved for the backward: keep ``lse.detach()`` where it is only logged.

    Under autocast q, k and v are cast to autocast's dtype, float64 excepted, as in torch's own attention; the sink keeps its dtype.

    DTensors q, k, v on one 1-D mesh, all Shard(1) (heads, dividing evenly) or all Replicate(), give DTensors: ``out`` and ``lse``
    placed alike, ``max_logits`` Shard(0). The key's head counts are those of ``to_local()``. The sink is a DTensor too, sharded over
    its heads alike or Replicate().

    Under ``torch.compile``, and wherever a dispatch mode is active, a call is one operator, ``magi_attention::distributed_attn``, and its
    backward another; another key is another number to it, and compiles nothing anew.

    Raises:
        ValueError: tensors that are not what the key was made for, DTensors placed otherwise, a wrapper tensor without memory, or a key
            behind which no plan stands.
        RuntimeError: differentiating its gradients again.
        CommTimeoutError: a peer did not take part within the process group's timeout; it names who.
    """
    q, k, v = as_autocast_casts(q, k, v)
    scale = None if softmax_scale is None else float(softmax_scale)
    if isinstance(q, Tensor) and is_observed(q):
        if not torch.compiler.is_compiling():
            checks.check_qkv(q, k, v, cache.get_session(key))
            checks.check_sink(sink, q)
        out, lse, best = distributed_attn(q, k, v, sink, key.handle, scale, float(softcap), return_max_logits)
        return out, AttnForwardMeta(lse=lse, max_logits=best if return_max_logits else None)
    session, options = prepare(q, k, v, key, sink, scale, float(softcap), return_max_logits)
    q, k, v = (as_last_contiguous(x) for x in (q, k, v))
    out, lse, max_logits = DistributedAttention.apply(q, k, v, sink, session, options)
    return out, AttnForwardMeta(lse=lse, max_logits=max_logits)
