"""What stands behind a key on this rank: the plan, this rank's part of it, and what is derived from them once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.common.tensor_kinds import as_constant, for_keeping
from magi_attention.kernels.interface import KernelMask
from magi_attention.plan import AttnPlan, RankPlan, ShardLayout, StagePlan, build_plan
from magi_attention.plan.cost import Heads
from magi_attention.plan.joint import joint_layout
from magi_attention.plan.query_moves import RowBytes
from magi_attention.runtime.key import DistAttnRuntimeKey


@dataclass(frozen=True, eq=False)
class Session:
    """A key, its plan, and caches of what kernels and collectives derive from it. ``derived``: keyed by who derives.

    Threads share a session. What is derived is never removed, and equal whoever derives it, so two threads that derive the same at once
    lose time and nothing else.
    """

    key: DistAttnRuntimeKey
    plan: AttnPlan
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Known to the key itself, because a graph is made of its attributes and sees nothing of a session.
        rows = tuple(int(self.layout(role).num_rows[self.key.cp_rank]) for role in (AttnRole.QUERY, AttnRole.KEY))
        object.__setattr__(self.key, "num_local_rows", rows)

    @cached_property
    def rank_plan(self) -> RankPlan:
        return self.plan.rank(self.key.cp_rank)

    @cached_property
    def host_mask(self) -> KernelMask:
        part = self.rank_plan
        return KernelMask(part.host_bands, part.num_q, part.num_k)

    @cached_property
    def stage_masks(self) -> tuple[KernelMask, ...]:
        """Of the forward's stages."""
        return self._masks_of(self.rank_plan.stages)

    @cached_property
    def backward_stage_masks(self) -> tuple[KernelMask, ...]:
        """Of the backward's stages: the same values where both have the same stages, so that work lists are shared."""
        part = self.rank_plan
        return self.stage_masks if part.backward_stages is part.stages else self._masks_of(part.backward_stages)

    @cached_property
    def guest_mask(self) -> KernelMask:
        """Of other ranks' queries that are computed here."""
        part = self.rank_plan
        assert part.guests is not None
        return KernelMask(part.guests.bands, part.guests.exchange.num_received, part.num_k)

    def _masks_of(self, stages: tuple[StagePlan, ...]) -> tuple[KernelMask, ...]:
        num_q = self.rank_plan.num_q
        return tuple(KernelMask(stage.bands, num_q, stage.exchange.num_received) for stage in stages)

    def layout(self, role: AttnRole) -> ShardLayout:
        """The layout of the q side, or of the k side for KEY and VALUE."""
        return self.plan.q_layout if role == AttnRole.QUERY else self.plan.k_layout

    def positions(self, role: AttnRole, device: torch.device) -> Tensor:
        """``[num_local_rows]`` int64 on ``device``: global positions of this rank's rows, padding at or behind the total."""
        at = ("positions", self.layout(role) is self.plan.q_layout, device)
        if at not in self.derived:
            with for_keeping():
                self.derived[at] = torch.from_numpy(self.layout(role).positions(self.key.cp_rank)).to(device)
        return as_constant(self.derived[at])


def open_session(key: DistAttnRuntimeKey, layout_session: Session | None) -> Session:
    """Plan a key. ``layout_session`` is what stands behind its ``layout_key``."""
    q_layout = k_layout = None
    if layout_session is not None:
        if key.keeps_dispatch:
            q_layout, k_layout = layout_session.plan.q_layout, layout_session.plan.k_layout
        else:
            q_layout, k_layout = _borrowed_layouts(key, layout_session.plan.q_layout)
    if key.companions:
        masks, weights = zip(*key.companions, strict=True)
        q_layout = joint_layout(
            masks,
            weights,
            key.cp_size,
            key.config,
            pad_size=key.requested_pad_size,
            min_chunks_per_rank=key.min_chunks_per_rank,
        )
    plan = build_plan(
        key.mask,
        key.cp_size,
        key.config,
        is_same_source=key.is_same_source,
        is_q_permutable=key.is_q_permutable,
        is_k_permutable=key.is_k_permutable,
        pad_size=key.requested_pad_size,
        min_chunks_per_rank=key.min_chunks_per_rank,
        q_layout=q_layout,
        k_layout=k_layout,
        heads=Heads(key.num_heads_q, key.num_heads_kv, key.head_dim),
        moves_queries=None
        if key.moves_queries is False
        else RowBytes.of(key.num_heads_q, key.num_heads_kv, key.head_dim),
        only_few_queries=key.moves_queries is None,
        ranks_per_node=key.ranks_per_node,
    )
    return Session(key, plan)


def _borrowed_layouts(key: DistAttnRuntimeKey, layout: ShardLayout) -> tuple[ShardLayout | None, ShardLayout | None]:
    """``layout`` for the sides of ``key`` that are not permutable and have its length."""
    fits_q = not key.is_q_permutable and key.total_seqlen_q == layout.total_seqlen
    fits_k = not key.is_k_permutable and key.total_seqlen_k == layout.total_seqlen
    if not (fits_q or fits_k):
        raise ValueError(
            f"layout_key lays out {layout.total_seqlen} queries, for a side that is not permutable and as long; got "
            f"total_seqlen_q={key.total_seqlen_q} (is_q_permutable={key.is_q_permutable}), "
            f"total_seqlen_k={key.total_seqlen_k} (is_k_permutable={key.is_k_permutable}). Clear the flag of the side that "
            "layout_key is for, or leave layout_key out"
        )
    return layout if fits_q else None, layout if fits_k else None
