"""How remote rows are dealt to stages, and how many stages there are."""

from __future__ import annotations

import numpy as np

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import GreedyOverlapAlg, OverlapConfig
from magi_attention.mask.bands import Ints, expand
from magi_attention.plan.cost import CostModel, backward_times, best_time, forward_times
from magi_attention.plan.dealing import cut_entries, in_order, split_uniform
from magi_attention.plan.demand import BEGIN, DST, END, STAGE, rows_by_rank
from magi_attention.plan.hierarchy import split_uniform_by_node
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.workload import Dealing, WorkDensity, cells_at_home, predict


def split_greedy(table: Ints, num_stages: int, density: WorkDensity, max_num_chunks: int) -> Ints:
    """Deal to every destination the rows that most of its work waits for first.

    A destination's rows are cut into at most ``max_num_chunks`` blocks, ordered by cells per row, and dealt in that order so that the
    stages hold equally many cells: the first is few rows and much work, behind which the next ones travel.
    """
    if num_stages <= 1 or not len(table):
        return table
    blocks = _in_blocks(table, max_num_chunks)
    cells = np.rint(density.cells(blocks)).astype(np.int64)
    rows = blocks[:, END] - blocks[:, BEGIN]
    order = np.lexsort((-cells / rows, blocks[:, DST]))
    destination = blocks[order, DST]
    done = np.append(0, np.cumsum(cells[order]))
    group_first = np.flatnonzero(np.diff(destination, prepend=-1))
    group = np.cumsum(np.diff(destination, prepend=-1) != 0) - 1
    before_group, total = done[group_first], np.diff(done[np.append(group_first, len(order))])
    twice_middle = done[1:] + done[:-1] - 2 * before_group[group]
    stage = twice_middle * num_stages // np.maximum(2 * total, 1)[group]
    blocks[order, STAGE] = np.minimum(stage, num_stages - 1)
    return in_order(blocks)


def _in_blocks(table: Ints, max_num_chunks: int) -> Ints:
    """Cut entries so that no part holds more than a ``max_num_chunks``-th of its destination's rows."""
    length = table[:, END] - table[:, BEGIN]
    total = np.zeros(int(table[:, DST].max()) + 1, np.int64)
    np.add.at(total, table[:, DST], length)
    size = np.maximum(-(-total // max_num_chunks), 1)[table[:, DST]]
    row, part = expand(np.zeros_like(length), -(-length // size))
    return cut_entries(table, row, part * size[row], np.minimum((part + 1) * size[row], length[row]))


def deal(
    transfers: Ints,
    bands: Ints,
    q_layout: ShardLayout,
    k_layout: ShardLayout,
    areas: Ints,
    config: OverlapConfig,
    cost: CostModel,
    ranks_per_node: int | None,
) -> tuple[Dealing, Dealing]:
    """The stages of the forward and of the backward pass.

    STATIC takes the degree of ``config`` for both. DYNAMIC predicts every number of stages up to its maximum and takes, for each pass, the
    fastest, the fewest among equals: so never one that is predicted slower than one stage. Under hierarchy (``ranks_per_node``) rows are
    dealt evenly, whatever the algorithm, so that all ranks of a node need a row in the same stage.
    """
    if not len(transfers):
        none = Dealing(transfers, 0)
        return none, none
    most = _most_stages(transfers, len(areas), config)
    density = WorkDensity.of(bands, q_layout, k_layout.padded_seqlen) if _needs_density(config) and most > 1 else None

    def into(num_stages: int) -> Dealing:
        if ranks_per_node is not None:
            return Dealing(split_uniform_by_node(transfers, num_stages, k_layout, ranks_per_node), num_stages)
        if isinstance(config.alg, GreedyOverlapAlg) and density is not None:
            return Dealing(split_greedy(transfers, num_stages, density, config.max_num_chunks), num_stages)
        return Dealing(split_uniform(transfers, num_stages), num_stages)

    if config.mode is AttnOverlapMode.STATIC or density is None:
        only = into(most)
        return only, only
    home = cells_at_home(bands, q_layout, k_layout)
    tried = [into(degree) for degree in range(1, most + 1)]
    relayed = ranks_per_node is not None
    nodes = ranks_per_node if relayed else cost.ranks_per_node
    works = [predict(one, areas, home, density, k_layout, ranks_per_node=nodes, relayed=relayed) for one in tried]
    forward = best_time(float(forward_times(work, cost).max()) for work in works)
    backward = best_time(float(backward_times(work, cost).max()) for work in works)
    return tried[forward], tried[backward]


def _needs_density(config: OverlapConfig) -> bool:
    return config.mode is AttnOverlapMode.DYNAMIC or isinstance(config.alg, GreedyOverlapAlg)


def _most_stages(transfers: Ints, num_ranks: int, config: OverlapConfig) -> int:
    """The degree asked for (under DYNAMIC, the largest to try), or as many stages as leave the busiest rank
    ``min_chunk_size`` rows in each."""
    wanted = config.degree if config.mode is AttnOverlapMode.STATIC else config.dynamic_max_degree
    if not config.enable:
        return 1
    busiest = int(rows_by_rank(transfers, DST, num_ranks).max())
    return max(1, min(wanted or 8, busiest // config.min_chunk_size))
