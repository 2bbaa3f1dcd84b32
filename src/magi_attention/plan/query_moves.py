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

All pairs of ranks that exchange anything are looked at together (``plan.covers``), in the host's local rows: what a piece of the mask
asks of a host, of however many runs, is one interval there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, Ints, expand, split_q
from magi_attention.plan.covers import Requests, best_covers
from magi_attention.plan.demand import BEGIN, DST, END, SRC, split_by_owner, union_by_group
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.own_keys import OwnKeys

Flags = NDArray[np.bool_]

# A rank may take guests up to this many hundredths of the mean area, or up to what the busiest rank has anyway.
GUEST_SLACK_PERCENT = 105


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


def queries_are_few(bands: Ints, num_keys: int, num_ranks: int, row_bytes: RowBytes) -> bool:
    """Whether sending every query that attends anything to every other rank would move fewer bytes than ``num_keys`` rows of keys are."""
    asking = union_by_group(np.zeros(len(bands), np.int64), bands[:, Q0], bands[:, Q1])
    num_asking = int((asking[:, 2] - asking[:, 1]).sum())
    return num_asking * (num_ranks - 1) * row_bytes.query < num_keys * row_bytes.key


@dataclass(frozen=True, eq=False)
class Asked:
    """What queries ask of other ranks, by piece of a query chunk and host.

    ``bands`` ``[n, 6]``: the piece, with all its keys. ``chunk``, ``host``, ``pair`` ``[n]``: whose piece it is, whom it asks, and
    which of the pairs of ranks those are. ``begin``, ``end`` ``[n]``: the host's local rows among the keys, at least one.
    """

    bands: Ints
    chunk: Ints
    host: Ints
    pair: Ints
    begin: Ints
    end: Ints

    def select(self, which: Flags) -> Asked:
        columns = (self.bands, self.chunk, self.host, self.pair, self.begin, self.end)
        return Asked(*(column[which] for column in columns))

    def queries(self, own: OwnKeys) -> Ints:
        """``[n, 2]``: from the first query that attends a key of the host to the last."""
        first, last = own.positions(self.host, self.begin), own.positions(self.host, self.end - 1)
        begin = np.maximum(self.bands[:, Q0], first - self.bands[:, HI])
        end = np.minimum(self.bands[:, Q1], last - self.bands[:, LO] + 1)
        return np.stack([begin, end], axis=1)


@dataclass(frozen=True, eq=False)
class Moves:
    """What moves: ``moved`` ``[num_chunks, num_ranks]``, which query chunks are computed as guests of which ranks; ``guests``, the transfer
    table of their rows; ``transfers``, that of the keys that still move. Exactly the rows needed, each once."""

    moved: Flags
    guests: Ints
    transfers: Ints


def choose_moves(
    bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout, transfers: Ints, areas: Ints, row_bytes: RowBytes
) -> Moves | None:
    """Where queries move in place of ``transfers``, those of all keys that are needed; None where they do nowhere.

    For each pair of ranks, chunks are taken by falling demand, and as many of them move as makes the fewest bytes: the best cover where
    demands are nested, as under causal masks and suffixes. Pairs that save most come first, while the host's area allows. ``areas``:
    ``[num_ranks]`` cells of each rank's queries.
    """
    if not len(transfers):
        return None
    num_ranks, own = q_layout.num_ranks, OwnKeys(k_layout)
    opens = np.flatnonzero(np.diff(transfers[:, DST] * num_ranks + transfers[:, SRC], prepend=-1))
    pairs = transfers[opens][:, [DST, SRC]]  # (home, host), ascending
    asked = _ask(bands, q_layout, own, pairs)
    rows = np.stack([asked.begin, asked.end], axis=1)
    moves, saved = best_covers(
        Requests(asked.pair, asked.chunk, asked.host, rows, asked.queries(own)),
        np.add.reduceat(transfers[:, END] - transfers[:, BEGIN], opens),
        row_bytes.key,
        row_bytes.query,
    )
    wishes = asked.select(moves)
    cells = np.zeros(len(pairs), np.int64)
    np.add.at(cells, wishes.pair, own.cells(wishes.host, wishes.bands))
    accepted = _while_areas_allow(pairs, saved, cells, areas)
    if not accepted.any():
        return None

    guests = wishes.select(accepted[wishes.pair])
    moved = np.zeros((q_layout.num_chunks, num_ranks), bool)
    moved[guests.chunk, guests.host] = True
    pair_of_transfer = np.repeat(np.arange(len(pairs)), np.diff(np.append(opens, len(transfers))))
    remaining = _key_transfers(asked.select(accepted[asked.pair] & ~moves), pairs, own)
    together = np.concatenate([transfers[~accepted[pair_of_transfer]], remaining])
    together = together[np.argsort(together[:, DST] * num_ranks + together[:, SRC], kind="stable")]
    return Moves(moved, _guest_transfers(guests, own, q_layout), together)


def _ask(bands: Ints, q_layout: ShardLayout, own: OwnKeys, pairs: Ints) -> Asked:
    """All that is asked between ``pairs`` ``[m, 2]`` of ranks (home, host), ascending."""
    edges = q_layout.chunk_edges
    pieces, _, chunk = split_q(bands, edges[:-1], edges[1:])
    home = q_layout.owner[chunk]
    bounds = np.searchsorted(pairs[:, 0], np.arange(q_layout.num_ranks + 1))
    piece, pair = expand(bounds[home], bounds[home + 1] - bounds[home])
    host = pairs[pair, 1]
    begin, end = (own.below(host, pieces[piece, column]) for column in (K0, K1))
    some = begin < end
    piece, pair = piece[some], pair[some]
    return Asked(pieces[piece], chunk[piece], host[some], pair, begin[some], end[some])


def _while_areas_allow(pairs: Ints, saved: Ints, cells: Ints, areas: Ints) -> Flags:
    """``[num_pairs]``: which pairs move ``cells`` from home to host, those that save most first."""
    load, accepted = areas.tolist(), np.zeros(len(pairs), bool)
    even = int(areas.sum()) * GUEST_SLACK_PERCENT // (100 * len(areas))
    order = np.argsort(-saved, kind="stable")[: np.count_nonzero(saved)]
    waiting = list(zip(order.tolist(), *pairs[order].T.tolist(), cells[order].tolist(), strict=True))
    # A rank that gives work away can take some afterwards, hence the second round; only what is then left may load a rank beyond the mean.
    for limit in (even, even, max(even, int(areas.max()))):
        refused = []
        for one in waiting:
            pair, home, host, more = one
            if load[host] + more > limit:
                refused.append(one)
                continue
            accepted[pair] = True
            load[host] += more
            load[home] -= more
        waiting = refused
    return accepted


def _key_transfers(stays: Asked, pairs: Ints, own: OwnKeys) -> Ints:
    """The transfer table of the keys that queries that stay ask for."""
    needed = union_by_group(stays.pair, stays.begin, stays.end)
    home, host = pairs[needed[:, 0]].T
    at, begin, end = own.cut_rows(host, needed[:, 1], needed[:, 2])
    return np.stack([np.zeros_like(at), home[at], host[at], begin, end, own.below(host[at], begin)], axis=1)


def _guest_transfers(guests: Asked, own: OwnKeys, q_layout: ShardLayout) -> Ints:
    """The transfer table of the queries that attend keys of their hosts."""
    bands, host, queries = guests.bands, guests.host, guests.queries(own)
    # Between two runs of the host's keys there are queries that attend neither only where the band is narrower than the gap.
    narrow = bands[:, HI] - bands[:, LO] < bands[:, K1] - bands[:, K0] - 2
    cut, begin, end = own.cut_rows(host[narrow], guests.begin[narrow], guests.end[narrow])
    pieces = bands[narrow][cut]
    by_run = np.stack(
        [np.maximum(pieces[:, Q0], begin - pieces[:, HI]), np.minimum(pieces[:, Q1], end - pieces[:, LO])], axis=1
    )
    begin, end = np.concatenate([queries[~narrow], by_run]).T
    table = split_by_owner(union_by_group(np.concatenate([host[~narrow], host[narrow][cut]]), begin, end), q_layout)
    assert not (table[:, DST] == table[:, SRC]).any(), "a chunk is no guest at home"
    return table


def guest_cells(bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout, moved: Flags) -> tuple[Ints, Ints]:
    """``[num_ranks]`` each: the cells that every rank gives away with its queries, and those that it computes for guests."""
    chunk, host = np.nonzero(moved)
    edges = q_layout.chunk_edges
    pieces, _, chunk_of_piece = split_q(bands, edges[:-1], edges[1:])
    bounds = np.searchsorted(chunk, np.arange(q_layout.num_chunks + 1))
    piece, at = expand(bounds[chunk_of_piece], bounds[chunk_of_piece + 1] - bounds[chunk_of_piece])
    cells = OwnKeys(k_layout).cells(host[at], pieces[piece])
    given, taken = np.zeros(q_layout.num_ranks, np.int64), np.zeros(q_layout.num_ranks, np.int64)
    np.add.at(given, q_layout.owner[chunk[at]], cells)
    np.add.at(taken, host[at], cells)
    return given, taken
