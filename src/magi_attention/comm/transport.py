"""Rows of bytes between ranks: the two collectives that everything else here is made of.

Buffers are ``[rows, num_bytes]`` uint8. Without a group, or in a group of one rank, nothing is called and rows stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.pending import Pending, start
from magi_attention.comm.row_format import as_wide_integers

# The same function: newer torch warns of the older name, older torch lacks the newer one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def group_device(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors the group can move: the CPU if it can, else the current GPU."""
    if "cpu" in _backends(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def carrier_device(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """Where buffers of ``device`` must be to travel: there, or on the CPU where the group is gloo's, which moves no rows between GPUs."""
    return torch.device("cpu") if _backends(group).get(device.type, "gloo") == "gloo" else device


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The group's backend for each type of device."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def all_to_all_rows(
    send: Tensor,
    send_splits: Sequence[int],
    recv_splits: Sequence[int],
    group: dist.ProcessGroup | None,
    label: str,
) -> Pending[Tensor]:
    """Send ``send_splits[r]`` rows to each rank ``r``, laid end to end; receive ``recv_splits[r]`` from each, likewise.

    Every rank must call it, also one whose splits are all zero.
    """
    if group_size(group) == 1:
        return Pending(None, lambda: send)
    assert group is not None and len(send_splits) == len(recv_splits) == group_size(group)
    carrier = carrier_device(send.device, group)
    outgoing = send.to(carrier)
    incoming = torch.empty(sum(recv_splits), send.shape[1], dtype=torch.uint8, device=carrier)
    buffers = as_wide_integers(incoming), as_wide_integers(outgoing)
    collective = partial(
        dist.all_to_all_single,
        *buffers,
        list(recv_splits),
        list(send_splits),
        group=group,
        async_op=True,
    )
    sources, targets = ([rank for rank, rows in enumerate(splits) if rows] for splits in (recv_splits, send_splits))
    flight = start(collective, buffers, group, label, sources, targets)
    return Pending(flight, lambda: incoming.to(send.device))


def all_gather_rows(
    send: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None, label: str
) -> Pending[Tensor]:
    """Every rank's rows, laid end to end: ``counts[r]`` rows from rank ``r``, on every rank.

    Unequal counts travel padded to the largest: gloo gathers equal shares only, and sending to each rank apart would need a copy for each.
    """
    num_ranks, rank = group_size(group), group_rank(group)
    assert len(counts) == num_ranks and len(send) == counts[rank]
    if num_ranks == 1:
        return Pending(None, lambda: send)
    assert group is not None
    carrier, share = carrier_device(send.device, group), max(counts)
    outgoing = send.to(carrier)
    if len(send) < share:
        outgoing = torch.cat([outgoing, outgoing.new_zeros(share - len(send), send.shape[1])])
    incoming = torch.empty(num_ranks * share, send.shape[1], dtype=torch.uint8, device=carrier)
    buffers = as_wide_integers(incoming), as_wide_integers(outgoing)
    collective = partial(_all_gather, *buffers, group=group, async_op=True)
    flight = start(collective, buffers, group, label, range(num_ranks), range(num_ranks))

    def finish() -> Tensor:
        rows = incoming.to(send.device)
        if min(counts) == share:
            return rows
        return torch.cat([part[:count] for part, count in zip(torch.split(rows, share), counts, strict=True)])

    return Pending(flight, finish)
