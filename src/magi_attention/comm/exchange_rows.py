"""Group-cast and group-reduce: rows from their owners to their users, and what the users made of them back to the owners.

    group_cast      owner's row ──► every rank that needs it                    forward
    group_reduce    owner's row ◄── sum of what those ranks give for it         its adjoint

Both carry out one `plan.Exchange` as one all-to-all, in which all the tensors of the exchange travel together. Nothing here is seen by
autograd. Every rank of the group must take part, also where it neither sends nor receives. Sums are made in the order of the
ranks, so that they have the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.pending import Pending
from magi_attention.comm.row_format import RowFormat
from magi_attention.comm.transport import all_to_all_rows
from magi_attention.common.lse import merge_partial_
from magi_attention.mask.bands import expand
from magi_attention.plan import Exchange

# Rows that are added at a time on a CPU: their copies then stay in its caches, which makes the sum three times as fast.
CPU_BLOCK_ROWS = 1024

_sent_rows: WeakKeyDictionary[Exchange, dict[torch.device, Tensor]] = WeakKeyDictionary()
_owners: WeakKeyDictionary[Exchange, dict[torch.device, tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


@torch.no_grad()
def group_cast(
    tensors: Sequence[Tensor], exchange: Exchange, group: dist.ProcessGroup | None, *, label: str = "group_cast"
) -> Pending[tuple[Tensor, ...]]:
    """Send local rows to the ranks that need them.

    Args:
        tensors: each ``[num_local_rows, ...]``, of any dtypes and strides, on one device.
        exchange: this rank's part.
        group: None, or a group of one rank, calls no collective.
        label: what the rows are, for the error if they do not come.

    Returns:
        When waited for: for each tensor the rows received, ``[num_received, ...]`` source by source. They are views of one buffer, with a
        contiguous last axis.
    """
    row_format = RowFormat.of(tensors)
    send = _gather(row_format, tensors, sent_rows(exchange, tensors[0].device))
    return all_to_all_rows(send, exchange.send_splits, exchange.recv_splits, group, label).then(row_format.views)


@torch.no_grad()
def group_reduce(
    partials: Sequence[Tensor],
    into: Sequence[Tensor],
    exchange: Exchange,
    group: dist.ProcessGroup | None,
    *,
    transit_dtype: torch.dtype | None = None,
    label: str = "group_reduce",
) -> Pending[None]:
    """Send rows back to the ranks that `group_cast` brought them from, which add them up: the adjoint of `group_cast`.

    Args:
        partials: each ``[num_received, ...]``, in the order of the receive buffer.
        into: each ``[num_local_rows, ...]`` in the accumulation dtype; what arrives is added to it, in place, when waited for.
        exchange: the one of the group-cast.
        group: see `group_cast`.
        transit_dtype: in which the rows travel; left out, each tensor's own.
        label: see `group_cast`.
    """
    row_format = RowFormat.of(partials, None if transit_dtype is None else [transit_dtype] * len(partials))
    pending = _send_back(row_format, partials, exchange, group, label)

    def add(arrived: Tensor) -> None:
        for sum_, rows in zip(into, row_format.views(arrived), strict=True):
            kernels = _kernels(rows, sum_)
            if kernels is not None:
                kernels.sum_rows_(sum_, rows, kernels.Owners(*owners(exchange, rows.device)))
                continue
            for part, at in _by_source(rows, exchange):
                sum_.index_add_(0, at, part.to(sum_.dtype))

    return pending.then(add)


@torch.no_grad()
def group_reduce_lse(
    out_partial: Tensor,
    lse_partial: Tensor,
    into: tuple[Tensor, Tensor],
    exchange: Exchange,
    group: dist.ProcessGroup | None,
    *,
    transit_dtype: torch.dtype | None = None,
    label: str = "group_reduce_lse",
) -> Pending[None]:
    """Send attention of queries that `group_cast` brought back to their owners, which merge it by its log-sum-exp.

    Args:
        out_partial: ``[num_received, num_heads, head_dim]``, normalised by its own lse.
        lse_partial: ``[num_received, num_heads]`` float32 or float64, ``-inf`` where a query attended nothing. It travels as it is.
        into: ``(out [num_local_rows, num_heads, head_dim], lse [num_local_rows, num_heads])`` in the accumulation dtype; merged in place
            when waited for.
        exchange, group, label: see `group_reduce`.
        transit_dtype: in which ``out_partial`` travels; left out, its own.
    """
    partials = (out_partial, lse_partial)
    row_format = RowFormat.of(partials, [transit_dtype or out_partial.dtype, lse_partial.dtype])
    pending = _send_back(row_format, partials, exchange, group, label)

    def merge(arrived: Tensor) -> None:
        out, lse = into
        out_rows, lse_rows = row_format.views(arrived)
        kernels = _kernels(out_rows, lse_rows, out, lse)
        if kernels is not None:
            kernels.merge_rows_(out, lse, out_rows, lse_rows, kernels.Owners(*owners(exchange, out.device)))
            return
        sources = zip(_by_source(out_rows, exchange), _by_source(lse_rows, exchange), strict=True)
        for (out_part, at), (lse_part, _) in sources:
            merged_out, merged_lse = out.index_select(0, at), lse.index_select(0, at)
            merge_partial_(merged_out, merged_lse, out_part, lse_part)
            out.index_copy_(0, at, merged_out)
            lse.index_copy_(0, at, merged_lse)

    return pending.then(merge)


def sent_rows(exchange: Exchange, device: torch.device) -> Tensor:
    """``[num_sent]`` int64 on ``device``: the local row that is at each place of the send buffer. Made once for each exchange."""
    by_device = _sent_rows.setdefault(exchange, {})
    if device not in by_device:
        starts, ends = exchange.send_ranges.T
        by_device[device] = torch.from_numpy(expand(starts, ends - starts)[1]).to(device)
    return by_device[device]


def owners(exchange: Exchange, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``rows [m], begins [m + 1], places [num_sent]`` int64 on ``device``: see `row_kernels.Owners`. Made once for each exchange."""
    by_device = _owners.setdefault(exchange, {})
    if device not in by_device:
        starts, ends = exchange.send_ranges.T
        local = expand(starts, ends - starts)[1]
        rows, counts = np.unique(local, return_counts=True)
        begins = np.concatenate([[0], np.cumsum(counts)])
        by_device[device] = tuple(  # type: ignore[assignment]
            torch.from_numpy(x.astype(np.int64)).to(device) for x in (rows, begins, np.argsort(local, kind="stable"))
        )
    return by_device[device]


def _gather(row_format: RowFormat, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """As `RowFormat.gather`."""
    kernels = _kernels(*tensors)
    if kernels is None:
        return row_format.gather(tensors, rows)
    buffer = row_format.empty(len(rows), rows.device)
    for view, x in zip(row_format.views(buffer), tensors, strict=True):
        kernels.gather_rows_into(view, x, rows)
    return buffer


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, where there are any and they can take such rows."""
    kernels = _load_kernels() if all(x.is_cuda for x in tensors) else None
    return kernels if kernels is not None and kernels.can_take(*tensors) else None


@lru_cache(maxsize=1)
def _load_kernels() -> ModuleType | None:
    try:
        from magi_attention.comm import row_kernels
    except ImportError:  # a torch without Triton
        return None
    return row_kernels


def _send_back(
    row_format: RowFormat,
    partials: Sequence[Tensor],
    exchange: Exchange,
    group: dist.ProcessGroup | None,
    label: str,
) -> Pending[Tensor]:
    """The rows ``[num_sent, num_bytes]`` that the users of this rank's rows return for them."""
    return all_to_all_rows(row_format.pack(partials), exchange.recv_splits, exchange.send_splits, group, label)


def _by_source(rows: Tensor, exchange: Exchange) -> Iterator[tuple[Tensor, Tensor]]:
    """``(part, at)``: rows that came back from one rank, and the local rows they belong to, which are distinct within a part."""
    parts = torch.split(rows, list(exchange.send_splits))
    places = torch.split(sent_rows(exchange, rows.device), list(exchange.send_splits))
    for part, at in zip(parts, places, strict=True):
        if rows.device.type == "cpu":
            yield from zip(torch.split(part, CPU_BLOCK_ROWS), torch.split(at, CPU_BLOCK_ROWS), strict=True)
        elif len(at):
            yield part, at
