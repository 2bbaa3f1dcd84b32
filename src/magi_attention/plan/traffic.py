"""How many rows every rank receives and sends, counted without listing who sends what to whom.

A plan of one causal document over 1,024 ranks has millions of transfers; to compare layouts, their totals are enough.
"""

from __future__ import annotations

import numpy as np

from magi_attention.mask.bands import Ints
from magi_attention.plan.demand import demanded_intervals
from magi_attention.plan.layout import ShardLayout


def rows_moved(bands: Ints, q_layout: ShardLayout, k_layout: ShardLayout) -> tuple[Ints, Ints]:
    """``[num_ranks]`` each: the distinct remote k rows that a rank receives, and the rows of its own that it sends, once to each other."""
    rank, begin, end = demanded_intervals(bands, q_layout).T
    start, stop, owner, _ = k_layout.runs.T
    demanded, own, asked = (np.zeros(q_layout.num_ranks, np.int64) for _ in range(3))
    np.add.at(demanded, rank, end - begin)

    # Rows of a run that its own rank demands: demanded rows of all ranks in order, up to the run's ends.
    stride = k_layout.padded_seqlen + 1
    keyed_begin, keyed_end = rank * stride + begin, rank * stride + end
    before = np.append(0, np.cumsum(end - begin))
    next_begin = np.append(keyed_begin, np.iinfo(np.int64).max // 2)

    def covered(position: Ints) -> Ints:
        keyed = owner * stride + position
        at = np.searchsorted(keyed_end, keyed, side="right")
        result: Ints = before[at] + np.maximum(keyed - next_begin[at], 0)
        return result

    np.add.at(own, owner, covered(stop) - covered(start))
    # Rows of a run that any rank demands, once for each: what begins before a position, less what ends before it.
    by_all = _sum_below(begin, stop) - _sum_below(end, stop) - _sum_below(begin, start) + _sum_below(end, start)
    np.add.at(asked, owner, by_all)
    return demanded - own, asked - own


def _sum_below(points: Ints, positions: Ints) -> Ints:
    """``[len(positions)]``: the sum over points of how far each position is beyond them, 0 for points behind it."""
    ordered = np.sort(points, kind="stable")
    total = np.append(0, np.cumsum(ordered))
    count = np.searchsorted(ordered, positions)
    result: Ints = positions * count - total[count]
    return result
