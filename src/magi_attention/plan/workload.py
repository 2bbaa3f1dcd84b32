"""What each rank computes and moves in each stage, counted for all ranks at once: what predicted times are made of.

Cells at home and rows are exact. The cells of several remote stages are told apart by the density of work over keys, on a grid, and
add up to what is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints, area, expand, split_k, split_q
from magi_attention.plan.cost import Times, Workload
from magi_attention.plan.demand import BEGIN, DST, END, SRC, STAGE, rows_by_rank, union_by_group
from magi_attention.plan.hierarchy import two_hops
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.own_keys import OwnKeys

# Columns of the grid on which the density of work over keys is kept: fine enough to tell stages apart, and cheap.
_NUM_COLUMNS = 256


@dataclass(frozen=True, eq=False)
class Dealing:
    """Remote rows in stages: ``table`` in the order above, ``num_stages`` of them (some may be empty for some ranks)."""

    table: Ints
    num_stages: int


@dataclass(frozen=True, eq=False)
class WorkDensity:
    """How many cells each demanded key row stands for, by rank, on a grid of key columns: for prediction, never for results.

    ``edges``: ``[num_columns + 1]``. ``per_row``: ``[num_ranks, num_columns]`` cells per demanded row.
    """

    edges: Ints
    per_row: NDArray[np.float64]

    @classmethod
    def of(cls, bands: Ints, q_layout: ShardLayout, num_k: int) -> WorkDensity:
        """The density of a mask's work under a layout of its queries."""
        num_columns = min(_NUM_COLUMNS, max(num_k, 1))
        edges = np.unique(np.arange(num_columns + 1) * num_k // num_columns)
        shape = (q_layout.num_ranks, len(edges) - 1)
        cells, rows = np.zeros(shape), np.zeros(shape)
        pieces, _, run = split_q(bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
        parts, piece, column = split_k(pieces, edges[:-1], edges[1:])
        rank = q_layout.runs[run[piece], 2]
        np.add.at(cells, (rank, column), area(parts))
        merged = union_by_group(rank * shape[1] + column, parts[:, 2], parts[:, 3])
        np.add.at(rows.reshape(-1), merged[:, 0], merged[:, 2] - merged[:, 1])
        return cls(edges, cells / np.maximum(rows, 1))

    def cells(self, table: Ints) -> NDArray[np.float64]:
        """``[n]``: about how many of the destination's cells the rows of each entry of a transfer table stand for."""
        first = np.searchsorted(self.edges, table[:, BEGIN], side="right") - 1
        last = np.searchsorted(self.edges, table[:, END], side="left")
        entry, column = expand(first, last - first)
        begin = np.maximum(table[entry, BEGIN], self.edges[column])
        end = np.minimum(table[entry, END], self.edges[column + 1])
        cells = np.zeros(len(table))
        np.add.at(cells, entry, (end - begin) * self.per_row[table[entry, DST], column])
        return cells


def cells_at_home(bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout) -> Ints:
    """``[num_ranks]``: cells whose query and key one rank holds."""
    pieces, _, run = split_q(bands, q_layout.runs[:, 0], q_layout.runs[:, 1])
    rank = q_layout.runs[run, 2]
    cells = np.zeros(q_layout.num_ranks, np.int64)
    np.add.at(cells, rank, OwnKeys(k_layout).cells(rank, pieces))
    return cells


def predict(
    dealing: Dealing,
    areas: Ints,
    home: Ints,
    density: WorkDensity | None,
    k_layout: ShardLayout,
    *,
    ranks_per_node: int | None,
    relayed: bool,
) -> Workload:
    """The workload of a dealing in which keys move.

    ``areas``, ``home``: ``[num_ranks]`` all cells of each rank, and those of `cells_at_home`. ``density``: needed for several stages.
    ``ranks_per_node``: where rows within nodes and between them are told apart; ``relayed``: they cross in two hops.
    """
    num_stages, num_ranks, remote = dealing.num_stages, len(areas), areas - home
    if num_stages > 1 and density is not None:
        cells = np.zeros((num_stages, num_ranks))
        np.add.at(cells, (dealing.table[:, STAGE], dealing.table[:, DST]), density.cells(dealing.table))
        total = cells.cumsum(axis=0)[-1]  # in order, as `sum` is not on every processor
        cells = np.where(total > 0, cells / np.where(total > 0, total, 1), 1 / num_stages) * remote
    else:
        cells = np.repeat(remote[None, :] / max(num_stages, 1), num_stages, axis=0)
    if relayed and ranks_per_node is not None:
        hops = two_hops(dealing.table, k_layout, ranks_per_node)
        within, between = hops.second[hops.second[:, SRC] != hops.second[:, DST]], hops.first
    else:
        within, between = apart_by_node(dealing.table, ranks_per_node)
    rows, crossing = (rows_by_stage(table, num_stages, num_ranks) for table in (within, between))
    return Workload(home.astype(np.float64), cells, rows, crossing, relayed)


def apart_by_node(table: Ints, ranks_per_node: int | None) -> tuple[Ints, Ints]:
    """The entries of a transfer table within nodes, and those between them: none where ranks are on no nodes."""
    if ranks_per_node is None:
        return table, table[:0]
    crosses = table[:, SRC] // ranks_per_node != table[:, DST] // ranks_per_node
    return table[~crosses], table[crosses]


def rows_by_stage(table: Ints, num_stages: int, num_ranks: int) -> Times:
    """``[num_stages, num_ranks]``: rows that each rank sends or receives, whichever are more."""
    rows = np.zeros((num_stages, num_ranks))
    for stage in range(num_stages):
        part = table[table[:, STAGE] == stage]
        rows[stage] = np.maximum(rows_by_rank(part, DST, num_ranks), rows_by_rank(part, SRC, num_ranks))
    return rows
