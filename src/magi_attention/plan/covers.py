"""The cheapest cover of every pair of ranks, all at once: for each, whether its first chunks by falling demand move, and how many.

What the chunks that stay still need of the host is counted by component, a stretch of the host's rows that overlapping intervals make: as
from the first row that any of them needs to the last. That is exact where demands are nested, and never too few rows: what a
cover is said to save, it saves.

    rows of the host   0123456789        component 0-5 of chunks a, b; component 7-9 of chunk c
    a  ######            c  ###          by falling demand a, c, b: without a, b still needs 2 rows of the 6, so moving a saves 4
    b    ##
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints
from magi_attention.plan.demand import union_by_group

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests of chunks to hosts: ``pair``, ``chunk``, ``host`` ``[n]`` (a pair's home is the chunk's), ``rows`` ``[n, 2]`` of the host,
    and ``queries`` ``[n, 2]`` that ask for them. Every one of the pairs 0, 1, ... has some."""

    pair: Ints
    chunk: Ints
    host: Ints
    rows: Ints
    queries: Ints


@dataclass(frozen=True, eq=False)
class Groups:
    """Requests by (chunk, host), ordered by pair, then falling demand, then chunk: ``[g]`` each.

    ``pair``; ``demand``, how many rows; ``queries``, how many. ``first``: where each pair begins. ``place``: ``[n]`` the group of each
    request. ``intervals``: ``[m, 3]`` rows ``(place, begin, end)``, what each group needs, disjoint.
    """

    pair: Ints
    demand: Ints
    queries: Ints
    first: Ints
    place: Ints
    intervals: Ints

    @classmethod
    def of(cls, requests: Requests) -> Groups:
        key = requests.chunk * (int(requests.host.max()) + 1) + requests.host
        needed = union_by_group(key, *requests.rows.T)
        asking = union_by_group(key, *requests.queries.T)
        opens = np.flatnonzero(np.diff(needed[:, 0], prepend=-1))
        demand = np.add.reduceat(needed[:, 2] - needed[:, 1], opens)
        num_queries = np.add.reduceat(asking[:, 2] - asking[:, 1], np.flatnonzero(np.diff(asking[:, 0], prepend=-1)))
        group = np.searchsorted(needed[opens, 0], key)
        pair, chunk = np.empty_like(demand), np.empty_like(demand)
        pair[group], chunk[group] = requests.pair, requests.chunk
        order = np.lexsort((chunk, -demand, pair))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        needed[:, 0] = place[np.cumsum(np.diff(needed[:, 0], prepend=-1) != 0) - 1]
        pair = pair[order]
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        return cls(pair, demand[order], num_queries[order], first, place[group], needed)


def best_covers(requests: Requests, rows_of_pair: Ints, key_bytes: int, query_bytes: int) -> tuple[Flags, Ints]:
    """Which requests are served by moving the queries, ``[n]``, and at least how many bytes that saves, ``[num_pairs]``.

    ``rows_of_pair``: the distinct rows that move if no query does.
    """
    groups = Groups.of(requests)
    spent = query_bytes * _within(np.cumsum(groups.queries), groups)
    # Those that stay need at least what the one of the largest demand does: no pair saves more than this.
    rest = np.append(groups.demand[1:], 0)
    rest[np.append(groups.first[1:], len(rest)) - 1] = 0
    bound = key_bytes * (rows_of_pair[groups.pair] - rest) - spent
    promising = np.maximum.reduceat(bound, groups.first) > 0
    saved = np.zeros(len(promising), np.int64)
    if not promising.any():
        return np.zeros(len(requests.pair), bool), saved

    saving = key_bytes * _within(np.cumsum(_rows_spared(groups, promising)), groups) - spent
    best = np.maximum.reduceat(saving, groups.first)
    saved[promising] = np.maximum(best[promising], 0)
    at_best = np.flatnonzero(saving == best[groups.pair])
    last = at_best[np.searchsorted(groups.pair[at_best], np.arange(len(best)))]  # of those that move: the fewest
    moves = (np.arange(len(groups.pair)) <= last[groups.pair]) & (saved > 0)[groups.pair]
    return moves[groups.place], saved


def _within(total: Ints, groups: Groups) -> Ints:
    """A running total over groups, begun anew for every pair."""
    result: Ints = total - np.append(0, total[groups.first[1:] - 1])[groups.pair]
    return result


def _rows_spared(groups: Groups, promising: Flags) -> Ints:
    """``[g]``: how many rows fewer move when a group does after all before it in its pair; counted for promising pairs."""
    intervals = groups.intervals[promising[groups.pair[groups.intervals[:, 0]]]]
    stride = int(intervals[:, 2].max()) + 1
    by_row = np.argsort(groups.pair[intervals[:, 0]] * stride + intervals[:, 1], kind="stable")
    place, begin, end = intervals[by_row].T
    keyed = groups.pair[place] * stride
    reach = np.maximum.accumulate(keyed + end)
    component = np.cumsum(np.append(True, (keyed + begin)[1:] >= reach[:-1])) - 1

    # From the smallest demand up: the rows from the first to the last needed so far, of each component.
    num_groups = len(groups.pair)
    upwards = np.argsort(component * num_groups + num_groups - 1 - place, kind="stable")
    place, begin, end, component = place[upwards], begin[upwards], end[upwards], component[upwards]
    last = np.maximum.accumulate(component * stride + end)
    first = component * stride + stride - 1 - np.maximum.accumulate(component * stride + stride - 1 - begin)
    rows = last - component * stride - first
    grown = np.diff(rows, prepend=0)
    opens = np.diff(component, prepend=-1) != 0
    grown[opens] = rows[opens]
    spared = np.zeros(num_groups, np.int64)
    np.add.at(spared, place, grown)
    return spared
