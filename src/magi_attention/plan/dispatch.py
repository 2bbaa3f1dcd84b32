"""Which rank gets which chunk: the algorithms of the config, in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchConfig,
    DPDispatchAlg,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
)
from magi_attention.mask.bands import K0, K1, Ints, area, split_k, split_q
from magi_attention.plan import balance
from magi_attention.plan.affinity import affinity, top_p_heap
from magi_attention.plan.chunk_demand import ChunkDemand, chunk_demand
from magi_attention.plan.layout import ShardLayout

# How far over the best balance a rank's area may be where that saves communication, in thousandths of it.
AREA_SLACK_PERMILLE = 1045
# The search aims at that, and its result is accepted up to this.
ACCEPTED_PERMILLE = 1050


@dataclass(frozen=True, eq=False)
class DispatchProblem:
    """Chunks that want owners.

    ``bands``: ``[n, 6]`` the mask. ``q_edges`` ``[num_chunks + 1]``: where chunks begin, and the end. ``k_edges``: the same of
    the keys, whose chunks are
    owned with the queries' where ``owns_columns`` (self-attention). ``areas``: ``[num_chunks]`` attended cells.
    """

    bands: Ints
    q_edges: Ints
    k_edges: Ints
    owns_columns: bool
    areas: Ints
    num_ranks: int

    @property
    def max_chunks(self) -> int:
        """Chunks that a rank may hold: the same number for all, or one less under uneven shards."""
        return -(-len(self.areas) // self.num_ranks)

    def demand(self) -> ChunkDemand:
        return chunk_demand(self.bands, self.areas, self.q_edges, self.k_edges, self.owns_columns)

    @cached_property
    def heap(self) -> Ints:
        """Min-heap's assignment, which is about as even as chunks of these areas allow."""
        return balance.min_heap(self.areas, self.num_ranks, self.max_chunks)

    def permille_of_mean(self, permille: int) -> int:
        """So many thousandths of a rank's mean area."""
        return int(self.areas.sum()) * permille // (1000 * self.num_ranks)

    @property
    def can_be_even(self) -> bool:
        """Whether min-heap brings every rank so near to the mean as is accepted."""
        return self.largest_area(self.heap) <= self.permille_of_mean(ACCEPTED_PERMILLE)

    def largest_area(self, owner: Ints) -> int:
        loads = np.zeros(self.num_ranks, np.int64)
        np.add.at(loads, owner, self.areas)
        return int(loads.max())


def _by_area(function: Callable[[Ints, int, int], Ints], problem: DispatchProblem, alg: Any) -> Iterator[Ints]:
    yield function(problem.areas, problem.num_ranks, problem.max_chunks)


def _affinity(problem: DispatchProblem, alg: AffinityDispatchAlg) -> Iterator[Ints]:
    """Little moved within the slack; min-heap's; little moved within what min-heap's balance is. An assignment that misses its limit is not
    yielded.

    The slack counts from the mean or, where min-heap misses that by more, from what min-heap reaches.
    """
    num_ranks, heap = problem.num_ranks, problem.heap
    if num_ranks == 1 or not problem.areas.any():
        yield heap
        return
    tight = problem.largest_area(heap)
    if problem.can_be_even:
        wanted, accepted = (problem.permille_of_mean(permille) for permille in (AREA_SLACK_PERMILLE, ACCEPTED_PERMILLE))
        wanted = max(wanted, tight)
    else:
        wanted = accepted = tight * AREA_SLACK_PERMILLE // 1000
    found = affinity(problem.demand(), num_ranks, wanted, tight)
    roomy = next(found)
    if problem.largest_area(roomy) <= accepted:
        yield roomy
    yield heap
    yield from (owner for owner in found if problem.largest_area(owner) <= tight)


def _top_p_heap(problem: DispatchProblem, alg: ToppHeapDispatchAlg) -> Iterator[Ints]:
    yield top_p_heap(problem.demand(), problem.num_ranks, problem.max_chunks, alg.top_p)


def _lower_bound(problem: DispatchProblem, alg: LBDispatchAlg) -> Iterator[Ints]:
    bound = balance.lower_bound(problem.areas, problem.num_ranks, problem.max_chunks)
    raise ValueError(
        f"LBDispatchAlg only bounds the largest area of a rank (here {bound:,} cells) and assigns nothing; use BSDispatchAlg or "
        "MinHeapDispatchAlg, which come close to the bound"
    )


# Each gives assignments to choose from by their predicted step, the most promising first, each made when it is asked for.
ALGORITHMS: dict[type, Callable[[DispatchProblem, Any], Iterator[Ints]]] = {
    AffinityDispatchAlg: _affinity,
    MinHeapDispatchAlg: partial(_by_area, balance.min_heap),
    SequentialDispatchAlg: partial(_by_area, balance.sequential),
    SortedSequentialSelectAlg: partial(_by_area, balance.sorted_sequential),
    ToppHeapDispatchAlg: _top_p_heap,
    LBDispatchAlg: _lower_bound,
    DPDispatchAlg: partial(_by_area, balance.dynamic_programming),
    BSDispatchAlg: partial(_by_area, balance.binary_search),
}


def candidates(problem: DispatchProblem, config: DispatchConfig) -> Iterator[Ints]:
    """``[num_chunks]`` owners by the algorithm that ``config`` names: one, or several to choose from, made as they are asked for.

    Raises:
        ValueError: an algorithm that only bounds, or that cannot take so many chunks; it names what can.
    """
    return ALGORITHMS[type(config.alg)](problem, config.alg)


def dispatch(problem: DispatchProblem, config: DispatchConfig) -> Ints:
    """The first of the `candidates`."""
    return next(candidates(problem, config))


def chunk_areas(bands: Ints, chunk_edges: Ints) -> Ints:
    """``[num_chunks]`` attended cells of the queries of every chunk."""
    pieces, _, chunk = split_q(bands, chunk_edges[:-1], chunk_edges[1:])
    areas = np.zeros(len(chunk_edges) - 1, np.int64)
    np.add.at(areas, chunk, area(pieces))
    return areas


def place_keys(bands: Ints, q_layout: ShardLayout, chunk_edges: Ints, max_chunks: int) -> Ints:
    """Owners of key chunks, where keys may be placed apart from queries: where most of a chunk's rows are attended.

    Chunks whose best rank matters most choose first; ties go to the lower rank.
    """
    num_chunks, num_ranks = len(chunk_edges) - 1, q_layout.num_ranks
    pieces, _, run = split_q(bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
    parts, piece, chunk = split_k(pieces, chunk_edges[:-1], chunk_edges[1:])
    wanted = np.zeros((num_chunks, num_ranks), np.int64)
    np.add.at(wanted, (chunk, q_layout.runs[run[piece], 2]), parts[:, K1] - parts[:, K0])
    owner = np.empty(num_chunks, np.int64)
    room = np.full(num_ranks, max_chunks)
    advantage = wanted.max(axis=1, initial=0) * num_ranks - wanted.sum(axis=1)
    for chunk_index in np.argsort(-advantage, kind="stable").tolist():
        rank = int(np.argmax(np.where(room > 0, wanted[chunk_index], -1)))
        owner[chunk_index] = rank
        room[rank] -= 1
    return owner
