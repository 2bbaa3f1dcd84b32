"""Where queries move instead of keys.

A cell whose query lives on rank A and whose key lives on rank B is computed on A, for which the key's row moves, or on B, for
which the query's
row moves there and its partial output moves back. For one pair of ranks that is a choice of rows of a bipartite graph such that every cell
has at least one end that moves: a vertex cover, weighted by bytes. It is decided for whole query chunks: a chunk that moves to B is
computed there against all keys of B that it attends.

    keys of B    k0 k1 k2 k3
    chunk q0      x  x              k0..k3 move to A:   4 rows of keys
    chunk q1      x  x  x  x        q1 moves to B, k0 and k1 to A
    chunk q2      x  x              (a suffix over a long prefix is all q1)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, K1, Q0, Q1, Ints, area, split_k, split_q
from magi_attention.plan.demand import BEGIN, DST, END, SRC, split_by_owner, union_by_group
from magi_attention.plan.layout import ShardLayout

Flags = NDArray[np.bool_]

# A rank may take guests up to this share of the mean area, or up to what the busiest rank has anyway.
GUEST_SLACK = 1.05


@dataclass(frozen=True)
class RowBytes:
    """What moves in a training step, forward and backward, for one row: of keys (k, v out; again; dk, dv back), or of
    queries (q out, out and
    lse back; q, dout, lse, delta out, dq back)."""

    key: int
    query: int

    @classmethod
    def of(cls, num_heads_q: int, num_heads_kv: int, head_dim: int, itemsize: int = 2) -> RowBytes:
        """For heads of one head_dim and ``itemsize`` bytes an element; statistics are float32."""
        return cls(
            key=3 * 2 * num_heads_kv * head_dim * itemsize,
            query=num_heads_q * (5 * head_dim * itemsize + 3 * 4),
        )


def queries_are_few(bands: Ints, transfers: Ints, num_ranks: int, row_bytes: RowBytes) -> bool:
    """Whether sending every query that attends anything to every other rank would move fewer bytes than ``transfers`` of keys do."""
    asking = union_by_group(np.zeros(len(bands), np.int64), bands[:, Q0], bands[:, Q1])
    num_asking = int((asking[:, 2] - asking[:, 1]).sum())
    num_keys = int((transfers[:, END] - transfers[:, BEGIN]).sum())
    return num_asking * (num_ranks - 1) * row_bytes.query < num_keys * row_bytes.key


@dataclass(frozen=True, eq=False)
class Parts:
    """The mask cut by query chunk and by run of keys: ``bands`` ``[p, 6]``, and of each row its ``chunk``, key ``run``, and
    the ranks that own them."""

    bands: Ints
    chunk: Ints
    run: Ints
    q_rank: Ints
    k_rank: Ints

    def select(self, which: Flags) -> Parts:
        return Parts(self.bands[which], self.chunk[which], self.run[which], self.q_rank[which], self.k_rank[which])


def cut_in_parts(bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout) -> Parts:
    """All cells, by query chunk and run of keys."""
    edges, runs = q_layout.chunk_edges, k_layout.runs
    pieces, _, chunk = split_q(bands, edges[:-1], edges[1:])
    parts, piece, run = split_k(pieces, runs[:, 0], runs[:, 1])
    return Parts(parts, chunk[piece], run, q_layout.owner[chunk[piece]], runs[run, 2])


def choose_moves(parts: Parts, q_layout: ShardLayout, row_bytes: RowBytes) -> Flags:
    """``[num_chunks, num_ranks]``: which query chunks are computed as guests of which ranks.

    For each pair of ranks, chunks are taken by falling demand, and as many of them move as makes the fewest bytes: the best cover where
    demands are nested, as under causal masks and suffixes. Pairs that save most come first, while the host's area allows.
    """
    num_chunks, num_ranks = q_layout.num_chunks, q_layout.num_ranks
    moved = np.zeros((num_chunks, num_ranks), bool)
    remote = parts.select(parts.q_rank != parts.k_rank)
    if not len(remote.chunk):
        return moved
    load = np.zeros(num_ranks, np.int64)
    np.add.at(load, parts.q_rank, area(parts.bands))
    even = int(GUEST_SLACK * load.mean())

    pair = remote.q_rank * num_ranks + remote.k_rank
    order = np.argsort(pair, kind="stable")
    bounds = np.flatnonzero(np.diff(pair[order], prepend=-1, append=-1))
    plans = [
        _best_cover(remote, order[start:stop], row_bytes) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    waiting = sorted((one for one in plans if one[0] > 0), key=lambda one: -one[0])
    # A rank that gives work away can take some afterwards, hence the second round; only what is then left may load a rank beyond the mean.
    for limit in (even, even, max(even, int(load.max()))):
        refused = []
        for one in waiting:
            _, chunks, cells, host, home = one
            if load[host] + cells > limit:
                refused.append(one)
                continue
            moved[chunks, host] = True
            load[host] += cells
            load[home] -= cells
        waiting = refused
    return moved


def _best_cover(remote: Parts, at: Ints, row_bytes: RowBytes) -> tuple[int, Ints, int, int, int]:
    """For one pair of ranks, parts ``at``: ``(bytes saved, chunks that move, their cells, host, home)``."""
    bands, chunk = remote.bands[at], remote.chunk[at]
    chunks, index = np.unique(chunk, return_inverse=True)
    runs, column = np.unique(remote.run[at], return_inverse=True)
    need = np.zeros((len(chunks), len(runs)), np.int64)
    np.maximum.at(need, (index, column), bands[:, K1] - bands[:, K0])
    rows = union_by_group(index, bands[:, Q0], bands[:, Q1])
    queries = np.zeros(len(chunks), np.int64)
    np.add.at(queries, rows[:, 0], rows[:, 2] - rows[:, 1])
    by_demand = np.argsort(-need.sum(axis=1), kind="stable")
    # stay[t]: key rows that must move if the first t chunks of `by_demand` move.
    stay = np.append(np.maximum.accumulate(need[by_demand][::-1], axis=0)[::-1].sum(axis=1), 0)
    cost = np.append(0, np.cumsum(queries[by_demand])) * row_bytes.query + stay * row_bytes.key
    best = int(np.argmin(cost))
    moving = chunks[by_demand[:best]]
    cells = int(area(bands[np.isin(chunk, moving)]).sum())
    return int(cost[0] - cost[best]), moving, cells, int(remote.k_rank[at[0]]), int(remote.q_rank[at[0]])


def key_intervals(parts: Parts, moved: Flags) -> Ints:
    """``[n, 3]`` rows ``(rank, k_begin, k_end)``: the keys that ranks attend with queries that stay, own keys included."""
    stays = parts.select(~moved[parts.chunk, parts.k_rank])
    return union_by_group(stays.q_rank, stays.bands[:, K0], stays.bands[:, K1])


def guest_transfers(parts: Parts, moved: Flags, q_layout: ShardLayout) -> Ints:
    """The transfer table of query rows: exactly those of moved chunks that attend keys of the host, each once."""
    moves = parts.select(moved[parts.chunk, parts.k_rank])
    table = split_by_owner(union_by_group(moves.k_rank, moves.bands[:, Q0], moves.bands[:, Q1]), q_layout)
    assert not (table[:, DST] == table[:, SRC]).any(), "a chunk is no guest at home"
    return table
