"""What chunks attend, in whole columns: what a dispatcher knows of traffic before the chunks have owners.

Columns are the chunks of the key sequence. ``D[c]``, the columns that chunk ``c`` attends, is kept as intervals, so that what a rank would
receive with or without a chunk is a difference of two prefix sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, K1, Ints, split_q
from magi_attention.plan.demand import union_by_group

Counts = NDArray[np.int16] | NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ChunkDemand:
    """What is known of the chunks before they have owners.

    ``areas``: ``[num_chunks]`` attended cells. ``chunk``, ``first``, ``last``: ``[n]``, rows ``D[chunk]`` includes columns
    ``[first, last)``; ordered by chunk. ``rows``: ``[num_columns]`` key rows of each column. ``owns_columns``: column ``c`` belongs to the
    owner of chunk ``c`` (self-attention).
    """

    areas: Ints
    chunk: Ints
    first: Ints
    last: Ints
    rows: Ints
    owns_columns: bool


def chunk_demand(bands: Ints, areas: Ints, q_edges: Ints, k_edges: Ints, owns_columns: bool) -> ChunkDemand:
    """The demand of query chunks ``q_edges`` ``[num_chunks + 1]`` in columns ``k_edges``, from a mask's rows."""
    pieces, _, chunk = split_q(bands, q_edges[:-1], q_edges[1:])
    first = np.searchsorted(k_edges, pieces[:, K0], side="right") - 1
    last = np.searchsorted(k_edges, pieces[:, K1], side="left")
    chunk, first, last = union_by_group(chunk, first, last).T
    return ChunkDemand(areas, chunk, first, last, np.diff(k_edges), owns_columns)


def count_needs(demand: ChunkDemand, owner: Ints, num_ranks: int) -> Counts:
    """``[num_ranks, num_columns]`` int16 (int32 where ranks hold too many chunks): how many of a rank's chunks attend a column."""
    counts = np.int16 if np.bincount(owner).max(initial=0) <= np.iinfo(np.int16).max else np.int32
    change = np.zeros((num_ranks, len(demand.rows) + 1), counts)
    np.add.at(change, (owner[demand.chunk], demand.first), 1)
    np.add.at(change, (owner[demand.chunk], demand.last), -1)
    np.cumsum(change, axis=1, out=change)
    return change[:, :-1]


def traffic(demand: ChunkDemand, owner: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """``[num_ranks]`` each: rows of the columns that a rank needs and does not own, and those that it owns, once for every other that
    needs them. Where columns have no owners, all that is needed is received and nothing is sent."""
    needed = union_by_group(owner[demand.chunk], demand.first, demand.last)
    rank, first, last = needed.T
    row_at = np.append(0, np.cumsum(demand.rows))
    received = np.bincount(rank, weights=row_at[last] - row_at[first], minlength=num_ranks).astype(np.int64)
    if not demand.owns_columns:
        return received, np.zeros(num_ranks, np.int64)
    change = np.bincount(first, minlength=len(owner) + 1) - np.bincount(last, minlength=len(owner) + 1)
    stride = len(owner) + 1
    own = owner * stride + np.arange(len(owner))
    within = np.searchsorted(rank * stride + last, own, side="right")
    at_home = (np.append(rank * stride + first, np.iinfo(np.int64).max)[within] <= own).astype(np.int64)
    received -= np.bincount(owner, weights=at_home * demand.rows, minlength=num_ranks).astype(np.int64)
    others = np.cumsum(change)[:-1] - at_home
    return received, np.bincount(owner, weights=others * demand.rows, minlength=num_ranks).astype(np.int64)
