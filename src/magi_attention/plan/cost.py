"""What a plan costs in time, predicted: enough to choose between plans, and to see what will wait for what.

The timeline of one rank, as the executor runs it: the exchange of stage s + 1 is posted when stage s begins to compute, and a
stage computes
once its rows are there and the one before it is done.

    link      |cast 0 |cast 1      |cast 2|
    compute   |host      |stage 0  |......|stage 1 |...      dots: waiting
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import OverlapConfig

Times = NDArray[np.float64]

# Predicted times that differ by a smaller factor are equal: what separates them may be rounding.
TIE = 1 + 1e-9


@dataclass(frozen=True)
class CostModel:
    """Times of one rank's work, in one unit (seconds, where they are measured).

    Attributes:
        cell: of computing one attended cell (all heads), forward.
        row: of sending or receiving one row of keys and values, all heads.
        latency: of an exchange, whatever it carries.
        backward_ratio: backward computing over forward: five products for two.
        row_between: as ``row``, for a row that crosses between nodes; None where all links are alike.
        ranks_per_node: which ranks those links join; None where all links are alike.
    """

    cell: float
    row: float
    latency: float = 0.0
    backward_ratio: float = 2.5
    row_between: float | None = None
    ranks_per_node: int | None = None

    @property
    def step_cell(self) -> float:
        """Of computing one attended cell, forward and backward."""
        return self.cell * (1 + self.backward_ratio)


@dataclass(frozen=True)
class Heads:
    """What the plan is for.

    Attributes:
        num_heads_q: heads of queries.
        num_heads_kv: heads of keys and values.
        head_dim: of all three.
        itemsize: bytes of an element; 2 is bfloat16.
    """

    num_heads_q: int = 32
    num_heads_kv: int = 8
    head_dim: int = 128
    itemsize: int = 2

    @property
    def key_bytes(self) -> int:
        """Bytes of one row of keys and values."""
        return 2 * self.num_heads_kv * self.head_dim * self.itemsize

    @property
    def query_bytes(self) -> int:
        """Bytes of one row of queries."""
        return self.num_heads_q * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Machine:
    """One rank's machine, for those who think in rates rather than in costs of cells.

    Attributes:
        flops: attention FLOP/s that the kernel reaches.
        bandwidth: bytes/s that a rank receives while others do too.
        latency: seconds of an exchange, whatever it carries.
        bandwidth_between: bytes/s that a rank receives from other nodes; None where all links are alike.
        ranks_per_node: ranks that ``bandwidth`` joins, where ``bandwidth_between`` is given.
    """

    flops: float = 400e12
    bandwidth: float = 40e9
    latency: float = 30e-6
    bandwidth_between: float | None = None
    ranks_per_node: int | None = None

    def cost_model(
        self, num_heads_q: int, num_heads_kv: int, head_dim: int, itemsize: int = 2, head_dim_v: int | None = None
    ) -> CostModel:
        """Costs of cells and rows for these heads and ``itemsize`` bytes an element. A cell is ``2 * (d + dv)`` FLOPs a query head."""
        dims = head_dim + (head_dim if head_dim_v is None else head_dim_v)
        row_bytes = float(num_heads_kv * dims * itemsize)
        return CostModel(
            cell=2.0 * dims * num_heads_q / self.flops,
            row=row_bytes / self.bandwidth,
            latency=self.latency,
            row_between=None if self.bandwidth_between is None else row_bytes / self.bandwidth_between,
            ranks_per_node=self.ranks_per_node,
        )


def cost_of(config: OverlapConfig, heads: Heads) -> CostModel:
    """The costs that ``config`` gives; where it gives none (both factors are 1, the default), a current GPU's for these heads."""
    if config.calc_cost_factor == config.comm_cost_factor == 1.0 and config.latency_cost == 0.0:
        return Machine().cost_model(heads.num_heads_q, heads.num_heads_kv, heads.head_dim, heads.itemsize)
    return CostModel(cell=config.calc_cost_factor, row=config.comm_cost_factor, latency=config.latency_cost)


@dataclass(frozen=True, eq=False)
class Workload:
    """What every rank does in a plan.

    ``host_cells`` ``[num_ranks]``, ``stage_cells`` ``[num_stages, num_ranks]``: attended cells. ``stage_rows``, ``stage_between``
    ``[num_stages, num_ranks]``: rows sent or received, whichever are more, on links of a node and between nodes. ``relayed``: rows cross
    between nodes first, and are then handed on in the node; else both kinds of links are busy at once.
    """

    host_cells: Times
    stage_cells: Times
    stage_rows: Times
    stage_between: Times
    relayed: bool = False

    def transfers(self, cost: CostModel) -> Times:
        """``[num_stages, num_ranks]``: how long each exchange takes."""
        within = self.stage_rows * cost.row
        between = self.stage_between * (cost.row if cost.row_between is None else cost.row_between)
        if self.relayed:
            total: Times = 2 * cost.latency + within + between
            return total
        return cost.latency + np.maximum(within, between)


def forward_times(work: Workload, cost: CostModel) -> Times:
    """``[num_ranks]``: when each rank has its output."""
    return timeline(work, cost)[-1]


def timeline(work: Workload, cost: CostModel) -> Times:
    """``[2 + 3 * num_stages, num_ranks]`` forward: 0, the end of the host stage, then for each stage when its rows are
    there, when it begins to
    compute, when it is done. The last row is the end."""
    done = work.host_cells * cost.cell
    marks = [np.zeros_like(done), done]
    posted = np.zeros_like(done)
    for cells, transfer in zip(work.stage_cells, work.transfers(cost), strict=True):
        arrived = posted + transfer
        begin = np.maximum(done, arrived)
        done = begin + cells * cost.cell
        posted = begin
        marks += [arrived, begin, done]
    return np.stack(marks)


def backward_times(work: Workload, cost: CostModel) -> Times:
    """``[num_ranks]``: when each rank has its gradients. Those of a stage's keys travel home while the next stage computes."""
    cell = cost.cell * cost.backward_ratio
    done = work.host_cells * cell
    posted = link_free = np.zeros_like(done)
    for cells, transfer in zip(work.stage_cells, work.transfers(cost), strict=True):
        arrived = np.maximum(posted, link_free) + transfer
        begin = np.maximum(done, arrived)
        done = begin + cells * cell
        posted, link_free = begin, np.maximum(done, arrived) + transfer
    return np.maximum(done, link_free if len(work.stage_rows) else done)


def step_time(work: Workload, cost: CostModel) -> float:
    """Forward and backward of the slowest rank."""
    return float(forward_times(work, cost).max(initial=0) + backward_times(work, cost).max(initial=0))


def is_better(time: float, rows: int, than_time: float, than_rows: int) -> bool:
    """Whether a predicted time is to be preferred: it is less by more than rounding may make it, or equal and moves fewer rows.

    Every rank must choose the same plan, so this is the one comparison of predicted times. Callers keep the first of equal ones.
    """
    if time * TIE < than_time:
        return True
    return time < than_time * TIE and rows < than_rows


def best_time(times: Iterable[float]) -> int:
    """Which of predicted ``times`` is the least, by `is_better`; of equal ones the first."""
    best, least = 0, math.inf
    for at, time in enumerate(times):
        if is_better(time, 0, least, 0):
            best, least = at, time
    return best


def ideal_time(total_cells: float, num_ranks: int, cost: CostModel) -> float:
    """Forward and backward with perfect balance and nothing to wait for."""
    return total_cells / num_ranks * cost.step_cell
