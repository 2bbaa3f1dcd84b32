"""The plan: who computes what, who sends what to whom, and when. Plain numbers, the same on every rank.

`build_plan` is a pure function. It needs no process group and serves any rank of any world size; what only one rank needs (its
slices, its part in each exchange) is worked out when `AttnPlan.rank` is asked for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import Ints, area
from magi_attention.plan import demand
from magi_attention.plan.demand import BEGIN, DST, END, SRC, STAGE
from magi_attention.plan.exchange import Exchange
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.local_slices import local_pieces, segments_of_buffer, segments_of_layout, to_buffer
from magi_attention.plan.sharding import make_layouts


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One remote stage of one rank: ``bands`` ``[n, 6]`` in local q rows and in rows of the buffer that ``exchange`` fills."""

    exchange: Exchange
    bands: Ints


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does: ``host_bands`` ``[n, 6]`` in local q and local k rows, then the remote stages in order.

    Every rank has the same number of stages, so that all take part in each exchange, empty or not.
    """

    rank: int
    num_q: int
    num_k: int
    host_bands: Ints
    stages: tuple[StagePlan, ...]


@dataclass(frozen=True, eq=False)
class AttnPlan:
    """A mask spread over ranks.

    ``transfers``: ``[n, 6]`` int64, the columns of ``plan.demand``, ordered by stage, destination, source, position: every row that crosses
    from one rank to another, once.
    """

    mask: AttnMask
    q_layout: ShardLayout
    k_layout: ShardLayout
    transfers: Ints
    num_stages: int
    _ranks: dict[int, RankPlan] = field(default_factory=dict, repr=False)

    @property
    def num_ranks(self) -> int:
        return self.q_layout.num_ranks

    def rank(self, rank: int) -> RankPlan:
        """The part of one rank; computed once."""
        if rank not in self._ranks:
            self._ranks[rank] = self._build_rank(rank)
        return self._ranks[rank]

    def _build_rank(self, rank: int) -> RankPlan:
        pieces, q_by = local_pieces(self.mask.bands, self.q_layout, rank)
        own = self.transfers[(self.transfers[:, DST] == rank) | (self.transfers[:, SRC] == rank)]
        stages = []
        for stage in range(self.num_stages):
            table = own[own[:, STAGE] == stage]
            incoming = table[table[:, DST] == rank]
            segments = segments_of_buffer(incoming[:, BEGIN], incoming[:, END], incoming[:, SRC])
            exchange = demand.exchange_of(table, rank, self.num_ranks)
            stages.append(StagePlan(exchange, to_buffer(pieces, q_by, segments)))
        return RankPlan(
            rank=rank,
            num_q=int(self.q_layout.num_rows[rank]),
            num_k=int(self.k_layout.num_rows[rank]),
            host_bands=to_buffer(pieces, q_by, segments_of_layout(self.k_layout, rank)),
            stages=tuple(stages),
        )

    @cached_property
    def areas(self) -> Ints:
        """``[num_ranks]`` attended cells that each rank computes."""
        areas = np.zeros(self.num_ranks, np.int64)
        for rank in range(self.num_ranks):
            areas[rank] = area(local_pieces(self.mask.bands, self.q_layout, rank)[0]).sum()
        return areas

    @property
    def imbalance(self) -> float:
        """Largest area of a rank over the mean; 1 is perfect, and what an empty mask has."""
        return float(self.areas.max() / self.areas.mean()) if self.areas.any() else 1.0

    @cached_property
    def sent_rows(self) -> Ints:
        """``[num_ranks]`` k rows that each rank sends, all stages together."""
        return demand.rows_by_rank(self.transfers, SRC, self.num_ranks)

    @cached_property
    def received_rows(self) -> Ints:
        """``[num_ranks]`` k rows that each rank receives, all stages together."""
        return demand.rows_by_rank(self.transfers, DST, self.num_ranks)

    @property
    def ring_rows(self) -> int:
        """k rows that a ring (every rank receives every other rank's) would move in all."""
        return int((self.num_ranks - 1) * self.k_layout.padded_seqlen)

    def digest(self) -> bytes:
        """32 bytes that name this plan, the same in every process that was given the same arguments."""
        parts = [self.mask.digest(), self.transfers.tobytes(), np.int64(self.num_stages).tobytes()]
        for layout in (self.q_layout, self.k_layout):
            sizes = np.array([layout.total_seqlen, layout.padded_seqlen, layout.chunk_size, layout.num_ranks], np.int64)
            parts += [sizes.tobytes(), layout.owner.tobytes()]
        return hashlib.sha256(b"".join(parts)).digest()

    def describe(self) -> str:
        """The plan in words and a table, for a person: one line a rank."""
        q, k = self.q_layout, self.k_layout
        lines = [
            f"AttnPlan: {q.total_seqlen:,} queries (+{q.pad_size:,} padding) in {q.num_chunks:,} chunks of {q.chunk_size:,}, "
            f"{k.total_seqlen:,} keys (+{k.pad_size:,}) in {k.num_chunks:,} of {k.chunk_size:,}, on {self.num_ranks:,} ranks, "
            f"host stage + {self.num_stages} remote",
            f"area {self.mask.area:,} cells, largest rank {self.imbalance:.3f} of the mean; "
            f"rows received {int(self.received_rows.sum()):,}, a ring would move {self.ring_rows:,}",
            f"{'rank':>6} {'area':>18} {'sends':>12} {'receives':>12}  chunks",
        ]
        for rank in range(self.num_ranks):
            lines.append(
                f"{rank:>6} {self.areas[rank]:>18,} {self.sent_rows[rank]:>12,} {self.received_rows[rank]:>12,}  "
                + _abbreviate(q.rank_chunks(rank).tolist())
            )
        return "\n".join(lines)


def _abbreviate(chunks: list[int], most: int = 12) -> str:
    shown = " ".join(str(chunk) for chunk in chunks[:most])
    return shown if len(chunks) <= most else f"{shown} ... ({len(chunks)} in all)"


def build_plan(
    mask: AttnMask,
    num_ranks: int,
    config: DistAttnConfig | None = None,
    *,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    pad_size: int | None = None,
    min_chunks_per_rank: int = 8,
    q_layout: ShardLayout | None = None,
    k_layout: ShardLayout | None = None,
) -> AttnPlan:
    """Plan a mask over ``num_ranks`` ranks.

    Args:
        mask: what is attended; its lengths are unpadded.
        config: chunks, dispatch algorithm and stages; left out, the defaults.
        is_same_source: keys are made of the same rows as queries, so both are laid out alike.
        is_q_permutable, is_k_permutable: a side that is not is sharded in order, or as the layout given for it.
        pad_size: padding rows of q, as `DispatchConfig` and the number of ranks require; None or 0 computes them.
        min_chunks_per_rank: how many chunks a rank gets at least where the config names no chunk size.
        q_layout, k_layout: layouts already decided (a second mask over the same dispatch); left out, decided here.

    Raises:
        ValueError: lengths, flags, padding or layouts that do not fit together.
        NotImplementedError: an algorithm that is not there yet; it names what is.
    """
    config = config or DistAttnConfig()
    q_layout, k_layout = make_layouts(
        mask,
        num_ranks,
        config.dispatch_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        pad_size=pad_size,
        min_chunks_per_rank=min_chunks_per_rank,
        q_layout=q_layout,
        k_layout=k_layout,
    )
    transfers = demand.remote_transfers(mask.bands, q_layout, k_layout)
    num_stages = choose_num_stages(transfers, num_ranks, config)
    return AttnPlan(mask, q_layout, k_layout, demand.split_uniform(transfers, num_stages), num_stages)


def choose_num_stages(transfers: Ints, num_ranks: int, config: DistAttnConfig) -> int:
    """Remote stages of a plan: ``degree``, or as many as leave the busiest rank ``min_chunk_size`` rows in each; 0 where nothing moves."""
    if not len(transfers):
        return 0
    overlap = config.overlap_config
    received = demand.rows_by_rank(transfers, DST, num_ranks)
    wanted = overlap.degree if overlap.enable else 1
    return int(max(1, min(wanted, received.max() // overlap.min_chunk_size)))
