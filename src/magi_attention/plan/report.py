"""The certificate of a plan: who computes, sends, holds and waits for how much, beside what other methods would.

Cells and rows are counted. Times are predicted (see ``plan.cost``) for a machine that the caller describes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints
from magi_attention.plan.cost import (
    CostModel,
    Heads,
    Machine,
    Workload,
    backward_times,
    forward_times,
    ideal_time,
    timeline,
)
from magi_attention.plan.demand import BEGIN, DST, END, SRC, rows_by_rank
from magi_attention.plan.plan import AttnPlan
from magi_attention.plan.predicted import workloads
from magi_attention.plan.traffic import rows_moved


@dataclass(frozen=True)
class Alternative:
    """Another method under the same cost model.

    ``rows``: k rows (or as many bytes) received in all. ``step``: seconds, None where it cannot be used.
    """

    name: str
    rows: int
    step: float | None


@dataclass(frozen=True)
class PlanReport:
    """See `report`. Lists are by rank. Rows are of keys, bytes of a forward pass; times are seconds."""

    num_ranks: int
    area: list[int]
    imbalance: float
    rows_sent: list[int]
    rows_received: list[int]
    queries_received: list[int]
    bytes_received: list[int]
    rows_between_nodes: int
    rows_demanded: int
    rows_in_excess: int
    peak_bytes: list[int]
    forward_stages: int
    backward_stages: int
    forward: float
    backward: float
    forward_without_overlap: float
    backward_without_overlap: float
    efficiency: float
    stage_timeline: list[list[float]]
    alternatives: list[Alternative]

    @property
    def step(self) -> float:
        """Predicted forward and backward, in seconds."""
        return self.forward + self.backward

    def to_json(self) -> str:
        """All of it, for `from_json`, and the predicted step besides."""
        return json.dumps({**asdict(self), "step": self.step})

    @classmethod
    def from_json(cls, text: str) -> PlanReport:
        """The report that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        del fields["step"]
        return cls(**{**fields, "alternatives": [Alternative(**one) for one in fields["alternatives"]]})

    def __str__(self) -> str:
        return "\n".join([*self._summary(), *self._by_rank()])

    def _summary(self) -> list[str]:
        received = sum(self.rows_received)
        lines = [
            f"{self.num_ranks} ranks, area {sum(self.area):,} cells, largest rank {self.imbalance:.3f} of the mean",
            f"rows received {received:,} (busiest rank {max(self.rows_received):,}); distinct remote rows demanded "
            f"{self.rows_demanded:,}, excess {self.rows_in_excess:,}"
            + (f"; queries moved {sum(self.queries_received):,}" if any(self.queries_received) else "")
            + (f"; between nodes {self.rows_between_nodes:,}" if self.rows_between_nodes else ""),
            f"predicted forward {_ms(self.forward)} in 1 + {self.forward_stages} stages (without overlap "
            f"{_ms(self.forward_without_overlap)}), backward {_ms(self.backward)} in 1 + {self.backward_stages} "
            f"({_ms(self.backward_without_overlap)}); {self.efficiency:.1%} of ideal",
            f"{'method':<22} {'rows received':>16} {'predicted step':>15}",
            f"{'this plan':<22} {received:>16,} {_ms(self.step):>15}",
        ]
        lines += [f"{one.name:<22} {one.rows:>16,} {_ms(one.step):>15}" for one in self.alternatives]
        return lines

    def _by_rank(self) -> list[str]:
        lines = [f"{'rank':>5} {'area':>18} {'sends':>11} {'receives':>11} {'MiB in':>9} {'peak MiB':>9}"]
        lines += [
            f"{rank:>5} {self.area[rank]:>18,} {self.rows_sent[rank]:>11,} {self.rows_received[rank]:>11,} "
            f"{self.bytes_received[rank] / 2**20:>9.1f} {self.peak_bytes[rank] / 2**20:>9.1f}"
            for rank in range(self.num_ranks)
        ]
        return lines


def _ms(seconds: float | None) -> str:
    return "not possible" if seconds is None else f"{seconds * 1e3:.2f} ms"


def report(plan: AttnPlan, heads: Heads | None = None, machine: Machine | None = None) -> PlanReport:
    """The certificate of ``plan`` for these heads on this machine; left out, a Llama-like model and a current GPU cluster."""
    heads, machine = heads or Heads(), machine or Machine()
    cost = machine.cost_model(heads.num_heads_q, heads.num_heads_kv, heads.head_dim, heads.itemsize)
    forward, backward = workloads(plan, heads, cost)
    marks = timeline(forward, cost)
    times = float(forward_times(forward, cost).max()), float(backward_times(backward, cost).max())
    demanded = _demanded_rows(plan)
    received = int(plan.received_rows.sum())
    ideal = ideal_time(plan.mask.area, plan.num_ranks, cost)
    return PlanReport(
        num_ranks=plan.num_ranks,
        area=plan.areas.tolist(),
        imbalance=plan.imbalance,
        rows_sent=plan.sent_rows.tolist(),
        rows_received=plan.received_rows.tolist(),
        queries_received=plan.received_queries.tolist(),
        bytes_received=(plan.received_rows * heads.key_bytes + plan.received_queries * heads.query_bytes).tolist(),
        rows_between_nodes=_rows_between_nodes(plan, machine),
        rows_demanded=demanded,
        rows_in_excess=received - demanded,
        peak_bytes=_peak_bytes(plan, heads).tolist(),
        forward_stages=plan.forward.num_stages,
        backward_stages=plan.backward.num_stages,
        forward=times[0],
        backward=times[1],
        forward_without_overlap=_without_overlap(forward, cost, 1.0, 1),
        backward_without_overlap=_without_overlap(backward, cost, cost.backward_ratio, 2),
        efficiency=ideal / sum(times) if sum(times) else 1.0,
        stage_timeline=marks.T.tolist(),
        alternatives=alternatives(plan, heads, cost),
    )


def _demanded_rows(plan: AttnPlan) -> int:
    """Distinct remote rows that each rank needs, summed: counted from the mask apart from the transfers."""
    if plan.moved is not None:
        return int(rows_by_rank(plan.forward.table, DST, plan.num_ranks).sum())
    return int(rows_moved(plan.mask.bands, plan.q_layout, plan.k_layout)[0].sum())


def _rows_between_nodes(plan: AttnPlan, machine: Machine) -> int:
    """k rows that cross between nodes: those of the plan's hierarchy or, without one, of the machine's nodes."""
    if plan.ranks_per_node is not None or machine.ranks_per_node is None:
        return plan.rows_between_nodes
    table = plan.forward.table
    crosses = table[:, SRC] // machine.ranks_per_node != table[:, DST] // machine.ranks_per_node
    return int((table[crosses, END] - table[crosses, BEGIN]).sum())


def _peak_bytes(plan: AttnPlan, heads: Heads) -> Ints:
    """Bytes of attention's own tensors in the backward pass: q, k, v, out, dout, float32 dq, dk, dv, and two stages' buffers."""
    rows_q, rows_k = plan.q_layout.num_rows, plan.k_layout.num_rows
    resident = rows_q * (3 * heads.query_bytes + heads.num_heads_q * (heads.head_dim + 2) * 4)
    resident = resident + rows_k * (heads.key_bytes + 2 * heads.num_heads_kv * heads.head_dim * 4)
    largest = np.zeros(plan.num_ranks, np.int64)
    for stage in range(plan.backward.num_stages):
        part = plan.backward.table[plan.backward.table[:, 0] == stage]
        largest = np.maximum(largest, rows_by_rank(part, DST, plan.num_ranks) + rows_by_rank(part, SRC, plan.num_ranks))
    return resident + 2 * largest * heads.key_bytes


def _without_overlap(work: Workload, cost: CostModel, compute: float, transfers: int) -> float:
    cells = work.host_cells + work.stage_cells.sum(axis=0)
    moving = work.transfers(cost).sum(axis=0)
    total: NDArray[np.float64] = cells * cost.cell * compute + transfers * moving
    return float(total.max())


def alternatives(plan: AttnPlan, heads: Heads, cost: CostModel) -> list[Alternative]:
    """Ring, all-gather and head-sharded (Ulysses) exchange of the same mask, each at its best: computing perfectly balanced, the ring's
    transfers wholly overlapped."""
    num_ranks, length = plan.num_ranks, plan.k_layout.padded_seqlen
    compute = ideal_time(plan.mask.area, num_ranks, cost)
    foreign = length * (num_ranks - 1) // num_ranks  # rows that a rank does not hold
    per_node = cost.ranks_per_node if cost.row_between is not None and cost.ranks_per_node is not None else num_ranks
    row_between = cost.row if cost.row_between is None else cost.row_between
    crossing = (num_ranks - per_node) / max(num_ranks - 1, 1)  # share of the foreign rows that is on other nodes

    turned = foreign * (
        max(cost.row, row_between) if crossing else cost.row
    )  # a ring turns as fast as its slowest link
    ring = max(compute / (1 + cost.backward_ratio), turned) + max(
        compute * cost.backward_ratio / (1 + cost.backward_ratio), 2 * turned
    )
    hops = 3 * (num_ranks - 1) * cost.latency
    # The ranks of a node fetch a part each from the others, and share.
    gathered = compute + 3 * (foreign * cost.row + foreign * crossing / per_node * row_between + cost.latency)
    # Head-sharding sends q, k, v and brings out back; backward the same of the gradients and dout: of a rank's own rows all but its heads.
    # Heads of keys that are fewer than the ranks are copied, so that each rank has one.
    num_q, num_kv = heads.num_heads_q, heads.num_heads_kv
    copies = max(num_ranks / num_kv, 1.0)
    per_token = (2 * heads.query_bytes + heads.key_bytes * copies) / heads.key_bytes
    shared = int(length / num_ranks * (num_ranks - 1) / num_ranks * per_token)
    possible = num_q % num_ranks == 0 and max(num_ranks, num_kv) % min(num_ranks, num_kv) == 0
    exchanged = max(shared * (1 - crossing) * cost.row, shared * crossing * row_between)
    ulysses = compute + 3 * exchanged + 8 * cost.latency if possible else None
    return [
        Alternative("ring", foreign * num_ranks, ring + hops),
        Alternative("all-gather", foreign * num_ranks, gathered),
        Alternative("head-sharded (Ulysses)", shared * num_ranks, ulysses),
    ]
