"""Rows between the global tensor and the ranks' shards, unseen by autograd; `runtime.movers` makes them differentiable.

A shard holds ``[num_local_rows, ...]``: the rank's chunks in ascending order, padding included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from magi_attention.comm import gather_rows, group_cast, reduce_scatter_rows
from magi_attention.common.enum import AttnRole
from magi_attention.mask.bands import Ints, expand
from magi_attention.plan import Exchange
from magi_attention.plan.demand import BEGIN, DST, END, SRC, exchange_of, split_by_owner
from magi_attention.runtime.session import Session


def take_local_rows(x: Tensor, session: Session, role: AttnRole, pad_value: float) -> Tensor:
    """This rank's rows ``[num_local_rows, ...]`` of the global ``[total_seqlen, ...]``; padding rows hold ``pad_value``."""
    positions = session.positions(role, x.device)
    total = session.layout(role).total_seqlen
    is_padding = positions >= total
    if not bool(_has_padding(session, role)):
        return x.index_select(0, positions)
    if total == 0:
        return x.new_full((len(positions), *x.shape[1:]), pad_value)
    rows = x.index_select(0, positions.clamp(max=total - 1))
    rows[is_padding] = pad_value
    return rows


def _has_padding(session: Session, role: AttnRole) -> bool:
    return session.layout(role).pad_size > 0


def gather_global(local: Tensor, session: Session, role: AttnRole) -> Tensor:
    """The global ``[total_seqlen, ...]``, on every rank, of the ranks' shards."""
    layout = session.layout(role)
    rows = gather_rows(local, layout.num_rows.tolist(), session.key.cp_group)
    at = ("gathered", layout is session.plan.q_layout, local.device)
    if at not in session.derived:
        rank, row = layout.locate(np.arange(layout.total_seqlen))
        before = np.cumsum(layout.num_rows) - layout.num_rows
        session.derived[at] = torch.from_numpy(before[rank] + row).to(local.device)
    return rows.index_select(0, session.derived[at])


def reduce_local(grad: Tensor, session: Session, role: AttnRole) -> Tensor:
    """This rank's rows of the sum over ranks of their global ``[total_seqlen, ...]`` tensors; padding rows 0."""
    layout = session.layout(role)
    order = np.concatenate([layout.positions(rank) for rank in range(layout.num_ranks)])
    padded = torch.cat([grad, grad.new_zeros((layout.pad_size, *grad.shape[1:]))]) if layout.pad_size else grad
    rows = padded.index_select(0, torch.from_numpy(order).to(grad.device))
    return reduce_scatter_rows(rows, layout.num_rows.tolist(), session.key.cp_group)


def roll_exchange(session: Session, role: AttnRole, shift: int) -> tuple[Exchange, Ints]:
    """What a roll moves, and ``[num_local_rows]``: where each rolled row is in (local rows, then received rows)."""
    layout, rank = session.layout(role), session.key.cp_rank
    total = layout.total_seqlen
    targets = layout.runs.copy()
    targets[:, 1] = np.minimum(targets[:, 1], total)
    targets = targets[targets[:, 0] < targets[:, 1]]
    begin, length = (targets[:, 0] - shift) % total, targets[:, 1] - targets[:, 0]
    head = np.minimum(length, total - begin)  # a run whose source wraps around the end is two
    wanted = np.concatenate(
        [
            np.stack([targets[:, 2], begin, begin + head], axis=1),
            np.stack([targets[:, 2], np.zeros_like(begin), length - head], axis=1)[head < length],
        ]
    )
    table = split_by_owner(wanted[np.lexsort((wanted[:, 1], wanted[:, 0]))], layout)
    table = table[table[:, DST] != table[:, SRC]]
    received = table[table[:, DST] == rank]
    positions = layout.positions(rank)
    index = np.arange(len(positions))  # padding rows stay where they are
    source = (positions[positions < total] - shift) % total
    owner, row = layout.locate(source)
    arrival = expand(received[:, BEGIN], received[:, END] - received[:, BEGIN])[1]
    by_position = np.argsort(arrival, kind="stable")
    found = np.searchsorted(arrival[by_position], source)
    arrived = by_position[np.minimum(found, max(len(arrival) - 1, 0))] if len(arrival) else np.zeros_like(source)
    index[positions < total] = np.where(owner == rank, row, len(positions) + arrived)
    return exchange_of(table[table[:, SRC] == rank], received, layout.num_ranks), index


def roll_rows(local: Tensor, session: Session, role: AttnRole, shift: int) -> Tensor:
    """``torch.roll`` by ``shift`` of the global tensor along axis 0, on its shards; padding rows are left as they are."""
    total = session.layout(role).total_seqlen
    if total == 0 or shift % total == 0:
        return local.clone()
    at = ("roll", session.layout(role) is session.plan.q_layout, shift % total)
    if at not in session.derived:
        exchange, index = roll_exchange(session, role, shift % total)
        session.derived[at] = exchange, torch.from_numpy(index)
    exchange, index = session.derived[at]
    (received,) = group_cast((local,), exchange, session.key.cp_group, label=f"rows of roll by {shift}").wait()
    return torch.cat([local, received]).index_select(0, index.to(local.device))
