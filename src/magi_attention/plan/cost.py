"""What a plan costs in time, predicted: enough to choose between plans, and to see what will wait for what.

The timeline of one rank, as the executor runs it: the exchange of stage s + 1 is posted when stage s begins to compute, and a
stage computes
once its rows are there and the one before it is done.

    link      |cast 0 |cast 1      |cast 2|
    compute   |host      |stage 0  |......|stage 1 |...      dots: waiting
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


@dataclass(frozen=True)
class CostModel:
    """Times of one rank's work, in one unit (seconds, where they are measured).

    Attributes:
        cell: of computing one attended cell (all heads), forward.
        row: of sending or receiving one row of keys and values, all heads.
        latency: of an exchange, whatever it carries.
        backward_ratio: backward computing over forward: five products for two.
    """

    cell: float
    row: float
    latency: float = 0.0
    backward_ratio: float = 2.5


@dataclass(frozen=True)
class Machine:
    """One rank's machine, for those who think in rates rather than in costs of cells.

    Attributes:
        flops: attention FLOP/s that the kernel reaches.
        bandwidth: bytes/s that a rank receives while others do too.
        latency: seconds of an exchange, whatever it carries.
    """

    flops: float = 400e12
    bandwidth: float = 40e9
    latency: float = 30e-6

    def cost_model(
        self, num_heads_q: int, num_heads_kv: int, head_dim: int, itemsize: int = 2, head_dim_v: int | None = None
    ) -> CostModel:
        """Costs of cells and rows for these heads and ``itemsize`` bytes an element. A cell is ``2 * (d + dv)`` FLOPs a query head."""
        dims = head_dim + (head_dim if head_dim_v is None else head_dim_v)
        return CostModel(
            cell=2.0 * dims * num_heads_q / self.flops,
            row=float(num_heads_kv * dims * itemsize) / self.bandwidth,
            latency=self.latency,
        )


@dataclass(frozen=True, eq=False)
class Workload:
    """What every rank does in a plan.

    ``host_cells`` ``[num_ranks]``, ``stage_cells`` ``[num_stages, num_ranks]``: attended cells. ``stage_rows`` ``[num_stages,
    num_ranks]``: rows sent or
    received, whichever is more.
    """

    host_cells: Times
    stage_cells: Times
    stage_rows: Times


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
    for cells, rows in zip(work.stage_cells, work.stage_rows, strict=True):
        arrived = posted + cost.latency + rows * cost.row
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
    for cells, rows in zip(work.stage_cells, work.stage_rows, strict=True):
        transfer = cost.latency + rows * cost.row
        arrived = np.maximum(posted, link_free) + transfer
        begin = np.maximum(done, arrived)
        done = begin + cells * cell
        posted, link_free = begin, np.maximum(done, arrived) + transfer
    return np.maximum(done, link_free if len(work.stage_rows) else done)


def step_time(work: Workload, cost: CostModel) -> float:
    """Forward and backward of the slowest rank."""
    return float(forward_times(work, cost).max(initial=0) + backward_times(work, cost).max(initial=0))


def ideal_time(total_cells: float, num_ranks: int, cost: CostModel) -> float:
    """Forward and backward with perfect balance and nothing to wait for."""
    return total_cells / num_ranks * cost.cell * (1 + cost.backward_ratio)
