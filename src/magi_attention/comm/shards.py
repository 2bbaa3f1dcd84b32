"""Whole tensors of sharded ones, and shards of the sum of whole ones.

Each rank owns ``counts[r]`` rows of ``sum(counts)``; a whole tensor holds them laid end to end by rank. Nothing here is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.row_format import RowFormat
from magi_attention.comm.transport import all_gather_rows, all_to_all_rows, group_rank, group_size


@torch.no_grad()
def gather_rows(
    x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None, *, label: str = "gather_rows"
) -> Tensor:
    """The whole ``[sum(counts), ...]``, on every rank, of this rank's ``[counts[rank], ...]``; ``x`` itself in a group of one rank."""
    if group_size(group) == 1:
        return x
    row_format = RowFormat.of((x,))
    (whole,) = row_format.views(all_gather_rows(row_format.pack((x,)), counts, group, label).wait())
    return whole


@torch.no_grad()
def reduce_scatter_rows(
    x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None, *, label: str = "reduce_scatter_rows"
) -> Tensor:
    """This rank's ``[counts[rank], ...]`` of the sum of all ranks' ``x`` ``[sum(counts), ...]``; the adjoint of `gather_rows`.

    Summed in the order of ranks, in float32 where the dtype is narrower, so that every run has the same bits. In a group of one rank, ``x``
    itself.
    """
    if group_size(group) == 1:
        return x
    own = counts[group_rank(group)]
    row_format = RowFormat.of((x,))
    arrived = all_to_all_rows(row_format.pack((x,)), counts, [own] * len(counts), group, label).wait()
    (rows,) = row_format.views(arrived)
    first, *others = torch.split(rows, own) if own else (rows,)
    total = first.to(_wide(x.dtype), copy=True)
    for part in others:
        total += part
    return total.to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
