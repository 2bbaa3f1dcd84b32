"""Rows that cross between nodes once, whatever the number of ranks there that need them.

Ranks are numbered node by node: rank ``n * ranks_per_node + i`` is rank ``i`` of node ``n``. A row of rank ``i`` of one node
that is needed on another
goes to rank ``i`` there (hop 1, its *relay*), which hands it on to all on that node that need it (hop 2); rows of the own node go
directly, in hop 2.

    node 0    rank 0 ──hop 1──► rank 2    node 1, rank 2 is the relay of rank 0
                                  │ └─hop 2─► rank 3
                                  └─hop 2─► rank 2 itself
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import Ints, expand
from magi_attention.plan.dealing import cut_entries, in_order, split_uniform
from magi_attention.plan.demand import BEGIN, DST, END, SRC, SRC_LOCAL, STAGE, union_by_group
from magi_attention.plan.layout import ShardLayout

# One more column in the table of hop 2: the rank that holds the row itself, where SRC may be its relay.
OWNER = 6


@dataclass(frozen=True, eq=False)
class Hops:
    """The two transfer tables of a dealing.

    ``first``: columns of ``plan.demand``, between nodes, from owners to relays. ``second``: within nodes; SRC_LOCAL counts
    rows of SRC's own and,
    behind them, those that hop 1 of the stage brought it; ``OWNER`` is the seventh column. A relay hands rows to itself too,
    for its buffer.
    """

    first: Ints
    second: Ints


def two_hops(table: Ints, k_layout: ShardLayout, ranks_per_node: int) -> Hops:
    """Both hops of a flat transfer table (any stages)."""
    num_ranks = k_layout.num_ranks
    node_of_dst, node_of_src = table[:, DST] // ranks_per_node, table[:, SRC] // ranks_per_node
    crosses = node_of_dst != node_of_src
    relay = np.where(crosses, node_of_dst * ranks_per_node + table[:, SRC] % ranks_per_node, table[:, SRC])
    first = _first_hop(table[crosses], relay[crosses], k_layout)

    second = np.concatenate([table, table[:, SRC : SRC + 1]], axis=1)
    second[:, SRC] = relay
    second[crosses, SRC_LOCAL] = k_layout.num_rows[relay[crosses]] + _place_in_first(
        first, table[crosses], relay[crosses]
    )
    relayed = second[:, SRC] != second[:, OWNER]
    order = np.lexsort((second[:, BEGIN], second[:, OWNER], relayed, second[:, SRC], second[:, DST], second[:, STAGE]))
    assert num_ranks % ranks_per_node == 0
    return Hops(first, second[order])


def split_uniform_by_node(table: Ints, num_stages: int, k_layout: ShardLayout, ranks_per_node: int) -> Ints:
    """`split_uniform`, such that a row that several ranks of another node need is in one stage for all of them."""
    if num_stages <= 1 or not len(table):
        return table
    node_of_dst, node_of_src = table[:, DST] // ranks_per_node, table[:, SRC] // ranks_per_node
    crosses = node_of_dst != node_of_src
    crossing = table[crosses]
    relay = node_of_dst[crosses] * ranks_per_node + crossing[:, SRC] % ranks_per_node
    dealt = split_uniform(_first_hop(crossing, relay, k_layout), num_stages)
    dealt = dealt[np.lexsort((dealt[:, BEGIN], dealt[:, SRC], dealt[:, DST]))]
    stride = k_layout.padded_seqlen + 1

    def keyed(destination: Ints, source: Ints, position: Ints) -> Ints:
        result: Ints = (destination * k_layout.num_ranks + source) * stride + position
        return result

    begins, ends = (keyed(dealt[:, DST], dealt[:, SRC], dealt[:, column]) for column in (BEGIN, END))
    first = np.searchsorted(ends, keyed(relay, crossing[:, SRC], crossing[:, BEGIN]), side="right")
    last = np.searchsorted(begins, keyed(relay, crossing[:, SRC], crossing[:, END]), side="left")
    row, part = expand(first, last - first)
    begin = np.maximum(dealt[part, BEGIN], crossing[row, BEGIN]) - crossing[row, BEGIN]
    end = np.minimum(dealt[part, END], crossing[row, END]) - crossing[row, BEGIN]
    parts = cut_entries(crossing, row, begin, end)
    parts[:, STAGE] = dealt[part, STAGE]
    return in_order(np.concatenate([parts, split_uniform(table[~crosses], num_stages)]))


def _first_hop(crossing: Ints, relay: Ints, k_layout: ShardLayout) -> Ints:
    """What owners send to relays: for each stage, the union of what the relay's node needs of the owner."""
    num_ranks = k_layout.num_ranks
    group = (crossing[:, STAGE] * num_ranks + relay) * num_ranks + crossing[:, SRC]
    merged = union_by_group(group, crossing[:, BEGIN], crossing[:, END])
    stage_and_relay, source = np.divmod(merged[:, 0], num_ranks)
    stage, destination = np.divmod(stage_and_relay, num_ranks)
    if not len(merged):
        return np.empty((0, 6), np.int64)
    local = k_layout.locate(merged[:, 1])[1]
    return np.stack([stage, destination, source, merged[:, 1], merged[:, 2], local], axis=1)


def _place_in_first(first: Ints, crossing: Ints, relay: Ints) -> Ints:
    """``[n]``: where in its relay's hop 1 buffer each crossing entry begins. An entry lies inside one merged interval of ``first``."""
    if not len(crossing):
        return np.empty(0, np.int64)
    length = first[:, END] - first[:, BEGIN]
    before = np.cumsum(length) - length
    opens = np.append(True, np.any(np.diff(first[:, [STAGE, DST]], axis=0) != 0, axis=1))
    at_in_buffer = before - before[opens][np.cumsum(opens) - 1]
    num_ranks = int(max(first[:, SRC].max(), first[:, DST].max())) + 1
    stride = int(first[:, END].max()) + 1

    def keyed(stage: Ints, destination: Ints, source: Ints, position: Ints) -> Ints:
        result: Ints = ((stage * num_ranks + destination) * num_ranks + source) * stride + position
        return result

    keys = keyed(first[:, STAGE], first[:, DST], first[:, SRC], first[:, BEGIN])
    wanted = keyed(crossing[:, STAGE], relay, crossing[:, SRC], crossing[:, BEGIN])
    at = np.searchsorted(keys, wanted, side="right") - 1
    result: Ints = at_in_buffer[at] + crossing[:, BEGIN] - first[at, BEGIN]
    return result
