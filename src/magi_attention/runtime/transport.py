"""Keys to the ranks that need them and gradients back, in one hop or, under hierarchy, in two.

With two hops a row first crosses to its relay on the other node, and is handed on from there; its gradients are summed at the relay
before they cross back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm import Pending, group_cast, group_reduce
from magi_attention.plan import StagePlan


def cast_keys(
    tensors: Sequence[Tensor], stage: StagePlan, group: dist.ProcessGroup | None, label: str
) -> Pending[tuple[Tensor, ...]]:
    """The rows of a stage, ``[num_received, ...]`` of each of ``tensors`` ``[num_k, ...]``, when waited for."""
    if stage.relay is None:
        return group_cast(tensors, stage.exchange, group, label=label)

    def hand_on(relayed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held = [torch.cat([own, more]) for own, more in zip(tensors, relayed, strict=True)]
        return group_cast(held, stage.exchange, group, label=f"{label}, within nodes").wait()

    return group_cast(tensors, stage.relay, group, label=f"{label}, between nodes").then(hand_on)


def reduce_gradients(
    partials: Sequence[Tensor],
    into: Sequence[Tensor],
    stage: StagePlan,
    group: dist.ProcessGroup | None,
    transit_dtype: torch.dtype,
    label: str,
) -> Pending[None]:
    """Add a stage's gradients ``[num_received, ...]`` to those of the rows' owners, ``into`` ``[num_k, ...]``, when waited for."""
    if stage.relay is None:
        return group_reduce(partials, into, stage.exchange, group, transit_dtype=transit_dtype, label=label)
    relay, num_relayed = stage.relay, stage.relay.num_received
    held = [own.new_zeros((len(own) + num_relayed, *own.shape[1:])) for own in into]

    def send_home(_: None) -> None:
        for own, sums in zip(into, held, strict=True):
            own += sums[: len(own)]
        crossing = [sums[len(own) :] for own, sums in zip(into, held, strict=True)]
        group_reduce(crossing, into, relay, group, transit_dtype=transit_dtype, label=f"{label}, between nodes").wait()

    within = f"{label}, within nodes"
    return group_reduce(partials, held, stage.exchange, group, transit_dtype=transit_dtype, label=within).then(
        send_home
    )
