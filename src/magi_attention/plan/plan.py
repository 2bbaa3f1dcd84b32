"""The plan: who computes what, who sends what to whom, and when. Plain numbers, the same on every rank.

A plan serves any rank of any world size in one process; what only one rank needs (its slices, its part in each exchange) is worked out
when `AttnPlan.rank` is asked for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from magi_attention.mask import AttnMask
from magi_attention.mask.bands import Ints, area, split_q
from magi_attention.plan.demand import BEGIN, DST, END, SRC, STAGE, ByRank, exchange_of, rows_by_rank
from magi_attention.plan.exchange import Exchange
from magi_attention.plan.hierarchy import OWNER, Hops, two_hops
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.local_slices import (
    SOURCE,
    Flags,
    local_pieces,
    local_pieces_by_chunk,
    segments_of_buffer,
    segments_of_layout,
    to_buffer,
)
from magi_attention.plan.query_moves import guest_cells
from magi_attention.plan.workload import Dealing

if TYPE_CHECKING:
    from magi_attention.plan.cost import Heads, Machine
    from magi_attention.plan.report import PlanReport


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One exchange of one rank and what it computes with the rows that arrive.

    ``relay``: under hierarchy, the exchange between nodes that comes first: ``exchange`` then counts this rank's own k rows
    and, behind them, what
    ``relay`` brought; else None. ``bands``: ``[n, 6]``. Of keys: local q rows, and rows of the buffer that ``exchange``
    fills. Of guests: rows of that
    buffer, and local k rows.
    """

    exchange: Exchange
    bands: Ints
    relay: Exchange | None = None


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does: ``host_bands`` ``[n, 6]`` in local q and local k rows, then the remote stages in order.

    ``stages`` are the forward's, ``backward_stages`` the backward's (often the same). ``guests``: other ranks' queries that
    are computed here, or
    None where the plan moves none. Every rank has the same number of each, so that all take part in each exchange, empty or not.
    """

    rank: int
    num_q: int
    num_k: int
    host_bands: Ints
    stages: tuple[StagePlan, ...]
    backward_stages: tuple[StagePlan, ...]
    guests: StagePlan | None


@dataclass(frozen=True, eq=False)
class AttnPlan:
    """A mask spread over ranks.

    ``forward``, ``backward``: the k rows that cross from one rank to another, dealt to stages (tables with the columns of
    ``plan.demand``). ``guests``:
    such a table of q rows, empty unless queries move; ``moved``: ``[num_q_chunks, num_ranks]``, which chunks are computed as
    guests of which ranks,
    or None. ``ranks_per_node``: given, keys travel in two hops (see ``plan.hierarchy``). Threads share a plan: what it works out when asked
    is kept, never removed, and equal whichever thread worked it out.
    """

    mask: AttnMask
    q_layout: ShardLayout
    k_layout: ShardLayout
    forward: Dealing
    backward: Dealing
    guests: Ints
    moved: Flags | None = None
    ranks_per_node: int | None = None
    _ranks: dict[int, RankPlan] = field(default_factory=dict, init=False, repr=False)
    _hops: dict[int, Hops] = field(default_factory=dict, init=False, repr=False)
    _by_rank: dict[int, tuple[ByRank, ...]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_ranks(self) -> int:
        """Over how many ranks the mask is spread."""
        return self.q_layout.num_ranks

    @property
    def num_stages(self) -> int:
        """Remote stages of the forward pass."""
        return self.forward.num_stages

    def rank(self, rank: int) -> RankPlan:
        """The part of one rank; computed once."""
        if rank not in self._ranks:
            self._ranks[rank] = self._build_rank(rank)
        return self._ranks[rank]

    def hops(self, dealing: Dealing) -> Hops:
        """Both hops of ``forward`` or ``backward``, under hierarchy; computed once."""
        assert self.ranks_per_node is not None
        if id(dealing) not in self._hops:
            self._hops[id(dealing)] = two_hops(dealing.table, self.k_layout, self.ranks_per_node)
        return self._hops[id(dealing)]

    def _build_rank(self, rank: int) -> RankPlan:
        if self.moved is None:
            pieces, q_by = local_pieces(self.mask.bands, self.q_layout, rank)
            blocked = None
        else:
            pieces, q_by, chunk = local_pieces_by_chunk(self.mask.bands, self.q_layout, rank)
            blocked = self.moved[chunk]  # [p, num_ranks]
        stages = self._build_stages(rank, self.forward, pieces, q_by, blocked)
        same = self.backward is self.forward
        return RankPlan(
            rank=rank,
            num_q=int(self.q_layout.num_rows[rank]),
            num_k=int(self.k_layout.num_rows[rank]),
            host_bands=to_buffer(pieces, q_by, segments_of_layout(self.k_layout, rank)),
            stages=stages,
            backward_stages=stages if same else self._build_stages(rank, self.backward, pieces, q_by, blocked),
            guests=self._build_guests(rank) if len(self.guests) else None,
        )

    def _build_stages(
        self, rank: int, dealing: Dealing, pieces: Ints, q_by: Ints, blocked: Flags | None
    ) -> tuple[StagePlan, ...]:
        relayed = self.ranks_per_node is not None
        own = self._tables(dealing)
        sent, received = own[-1].sent(rank), own[-1].received(rank)
        owner_of = OWNER if relayed else SRC
        stages = []
        for stage in range(dealing.num_stages):
            incoming = _in_stage(received, stage)
            # Rows of one owner that came by one way ascend in position: those are the sources of the buffer.
            way = incoming[:, SRC] * self.num_ranks + incoming[:, owner_of]
            segments = segments_of_buffer(incoming[:, BEGIN], incoming[:, END], way)
            left_alone = None
            if blocked is not None:
                opens = np.diff(segments[:, SOURCE], prepend=-1) != 0
                left_alone = blocked[:, incoming[opens, owner_of]]
            relay = None
            if relayed:
                crossing, arriving = own[0].sent(rank), own[0].received(rank)
                relay = exchange_of(_in_stage(crossing, stage), _in_stage(arriving, stage), self.num_ranks)
            stages.append(
                StagePlan(
                    exchange=exchange_of(_in_stage(sent, stage), incoming, self.num_ranks),
                    bands=to_buffer(pieces, q_by, segments, left_alone),
                    relay=relay,
                )
            )
        return tuple(stages)

    def _tables(self, dealing: Dealing) -> tuple[ByRank, ...]:
        """What is exchanged, by rank: the table of a dealing or, under hierarchy, of both its hops; sorted once."""
        if id(dealing) not in self._by_rank:
            tables: tuple[Ints, ...] = (dealing.table,)
            if self.ranks_per_node is not None:
                hops = self.hops(dealing)
                tables = (hops.first, hops.second)
            self._by_rank[id(dealing)] = tuple(ByRank.of(table, self.num_ranks) for table in tables)
        return self._by_rank[id(dealing)]

    def _build_guests(self, rank: int) -> StagePlan:
        incoming = self._guests_by_rank.received(rank)
        length = incoming[:, END] - incoming[:, BEGIN]
        shift = np.cumsum(length) - length - incoming[:, BEGIN]
        by_position = np.argsort(incoming[:, BEGIN], kind="stable")
        ordered, shift = incoming[by_position], shift[by_position]
        pieces, _, at = split_q(self.mask.bands, ordered[:, BEGIN], ordered[:, END])
        bands = to_buffer(pieces, shift[at], segments_of_layout(self.k_layout, rank))
        return StagePlan(exchange_of(self._guests_by_rank.sent(rank), incoming, self.num_ranks), bands)

    @cached_property
    def _guests_by_rank(self) -> ByRank:
        return ByRank.of(self.guests, self.num_ranks)

    @cached_property
    def areas(self) -> Ints:
        """``[num_ranks]`` attended cells that each rank computes."""
        areas, moved = areas_of(self.mask, self.q_layout), self.guest_cells
        return areas if moved is None else areas - moved[0] + moved[1]

    @cached_property
    def guest_cells(self) -> tuple[Ints, Ints] | None:
        """``[num_ranks]`` each: cells that every rank gives away, and takes, with moved queries; None where none move."""
        if self.moved is None:
            return None
        return guest_cells(self.mask.bands, self.q_layout, self.k_layout, self.moved)

    @property
    def imbalance(self) -> float:
        """Largest area of a rank over the mean; 1 is perfect, and what an empty mask has."""
        return float(self.areas.max() / self.areas.mean()) if self.areas.any() else 1.0

    @cached_property
    def sent_rows(self) -> Ints:
        """``[num_ranks]`` k rows that each rank sends in a forward pass."""
        return rows_by_rank(self.forward.table, SRC, self.num_ranks)

    @cached_property
    def received_rows(self) -> Ints:
        """``[num_ranks]`` k rows that each rank receives in a forward pass."""
        return rows_by_rank(self.forward.table, DST, self.num_ranks)

    @cached_property
    def received_queries(self) -> Ints:
        """``[num_ranks]`` q rows of other ranks that each rank receives in a forward pass, to compute as guests."""
        return rows_by_rank(self.guests, DST, self.num_ranks)

    @cached_property
    def rows_between_nodes(self) -> int:
        """k rows that cross between nodes in a forward pass, all ranks together; 0 where ranks are on no nodes."""
        if self.ranks_per_node is None:
            return 0
        first = self.hops(self.forward).first
        return int((first[:, END] - first[:, BEGIN]).sum())

    @property
    def ring_rows(self) -> int:
        """k rows that a ring (every rank receives every other rank's) would move in all."""
        return int((self.num_ranks - 1) * self.k_layout.padded_seqlen)

    def digest(self) -> bytes:
        """32 bytes that name this plan, the same in every process that was given the same arguments."""
        parts = [self.mask.digest(), self.guests.tobytes()]
        for dealing in (self.forward, self.backward):
            parts += [dealing.table.tobytes(), np.int64(dealing.num_stages).tobytes()]
        for layout in (self.q_layout, self.k_layout):
            sizes = np.array([layout.total_seqlen, layout.padded_seqlen, layout.chunk_size, layout.num_ranks], np.int64)
            parts += [sizes.tobytes(), layout.owner.tobytes()]
        if self.moved is not None:
            parts.append(self.moved.tobytes())
        parts.append(str(self.ranks_per_node).encode())
        return hashlib.sha256(b"".join(parts)).digest()

    def report(self, heads: Heads | None = None, machine: Machine | None = None) -> PlanReport:
        """The certificate of this plan: see `plan.report.report`."""
        from magi_attention.plan.report import report  # which is written in terms of this class

        return report(self, heads, machine)

    def describe(self) -> str:
        """The plan in words and a table, for a person: one line a rank."""
        q, k = self.q_layout, self.k_layout
        head = (
            f"AttnPlan: {q.total_seqlen:,} queries (+{q.pad_size:,} padding) in {q.num_chunks:,} chunks of {q.chunk_size:,}, "
            f"{k.total_seqlen:,} keys (+{k.pad_size:,}) in {k.num_chunks:,} of {k.chunk_size:,}, on {self.num_ranks:,} ranks, "
            f"host stage + {self.num_stages} remote"
        )
        summary = (
            f"area {self.mask.area:,} cells, largest rank {self.imbalance:.3f} of the mean; "
            f"rows received {int(self.received_rows.sum()):,}, a ring would move {self.ring_rows:,}"
        )
        lines = [head, summary, f"{'rank':>6} {'area':>18} {'sends':>12} {'receives':>12}  chunks"]
        lines += [
            f"{rank:>6} {self.areas[rank]:>18,} {self.sent_rows[rank]:>12,} {self.received_rows[rank]:>12,}  "
            + _abbreviate(q.rank_chunks(rank).tolist())
            for rank in range(self.num_ranks)
        ]
        return "\n".join(lines)


def _in_stage(table: Ints, stage: int) -> Ints:
    return table[table[:, STAGE] == stage]


def areas_of(mask: AttnMask, q_layout: ShardLayout) -> Ints:
    """``[num_ranks]`` attended cells of the queries that each rank holds."""
    pieces, _, run = split_q(mask.bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
    areas = np.zeros(q_layout.num_ranks, np.int64)
    np.add.at(areas, q_layout.runs[run, 2], area(pieces))
    return areas


def _abbreviate(chunks: list[int], most: int = 12) -> str:
    shown = " ".join(str(chunk) for chunk in chunks[:most])
    return shown if len(chunks) <= most else f"{shown} ... ({len(chunks)} in all)"
