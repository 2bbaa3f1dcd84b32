"""The predicted step of a plan, and the choice between plans by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from magi_attention.mask.bands import Ints, area
from magi_attention.plan.cost import CostModel, Heads, Workload, backward_times, forward_times
from magi_attention.plan.plan import AttnPlan
from magi_attention.plan.workload import Dealing, WorkDensity, cells_at_home, predict

# Steps that differ by less are equal: what separates them may be rounding, and every rank must choose the same plan.
_TIE = 1 + 1e-9
# Where computing is less than this share of the step of a plan that moves little, plans that balance better are not looked at.
_BOUND_BY_COMPUTING = 0.9


def workloads(plan: AttnPlan, heads: Heads, cost: CostModel) -> tuple[Workload, Workload]:
    """What every rank does, forward and backward."""
    if plan.moved is not None:
        return _workload_with_guests(plan, plan.forward, heads), _workload_with_guests(plan, plan.backward, heads)
    home = cells_at_home(plan.mask.bands, plan.q_layout, plan.k_layout)
    density = None
    if max(plan.forward.num_stages, plan.backward.num_stages) > 1:
        density = WorkDensity.of(plan.mask.bands, plan.q_layout, plan.k_layout.padded_seqlen)
    relayed = plan.ranks_per_node is not None
    nodes = plan.ranks_per_node if relayed else cost.ranks_per_node

    def of(dealing: Dealing) -> Workload:
        return predict(dealing, plan.areas, home, density, plan.k_layout, ranks_per_node=nodes, relayed=relayed)

    forward = of(plan.forward)
    return forward, forward if plan.backward is plan.forward else of(plan.backward)


def _workload_with_guests(plan: AttnPlan, dealing: Dealing, heads: Heads) -> Workload:
    """Guests are a stage of their own, their rows counted in rows of keys of as many bytes. Counted from every rank's slices."""
    parts = [plan.rank(rank) for rank in range(plan.num_ranks)]
    of_pass = [part.stages if dealing is plan.forward else part.backward_stages for part in parts]
    host = np.array([_cells(part.host_bands) for part in parts], np.float64)
    cells = [[_cells(stages[number].bands) for stages in of_pass] for number in range(dealing.num_stages)]
    rows = [
        [max(stages[number].exchange.num_sent, stages[number].exchange.num_received) for stages in of_pass]
        for number in range(dealing.num_stages)
    ]
    guests = [part.guests for part in parts if part.guests is not None]
    both_ways = 2 * heads.query_bytes / heads.key_bytes
    cells.insert(0, [_cells(guest.bands) for guest in guests])
    rows.insert(0, [int(max(g.exchange.num_sent, g.exchange.num_received) * both_ways) for g in guests])
    shape = (-1, plan.num_ranks)
    stage_rows = np.array(rows, np.float64).reshape(shape)
    return Workload(host, np.array(cells, np.float64).reshape(shape), stage_rows, np.zeros_like(stage_rows))


def _cells(bands: Ints) -> int:
    return int(area(bands).sum())


def predicted_step(plan: AttnPlan, heads: Heads, cost: CostModel) -> float:
    """Forward and backward of the slowest rank, in the unit of ``cost``."""
    forward, backward = workloads(plan, heads, cost)
    return float(forward_times(forward, cost).max(initial=0) + backward_times(backward, cost).max(initial=0))


def not_slower_than(plan: AttnPlan, one: Dealing, heads: Heads, cost: CostModel) -> AttnPlan:
    """``plan``, with its remote rows in ``one`` stage in each pass that is predicted faster so.

    Needed where queries move, whose work is no part of what `stages.deal` predicts.
    """
    dealt, alone = (
        workloads(plan, heads, cost),
        workloads(replace(plan, forward=one, backward=one), heads, cost),
    )
    forward, backward = (
        one if times(few, cost).max() < times(many, cost).max() else dealing
        for times, many, few, dealing in (
            (forward_times, dealt[0], alone[0], plan.forward),
            (backward_times, dealt[1], alone[1], plan.backward),
        )
    )
    return replace(plan, forward=forward, backward=backward)


def fastest(plans: Iterator[AttnPlan], heads: Heads, cost: CostModel) -> AttnPlan:
    """The plan of the least predicted step, and among equals the fewest rows received, then the first.

    ``plans``: one; or one that moves little, another that balances areas better, and then, which are made only where balance may matter
    more, others between those.
    """
    best = next(plans)
    second = next(plans, None)
    if second is None:
        return best
    largest_area = float(best.areas.max())
    least = predicted_step(best, heads, cost)
    for number, plan in enumerate(itertools.chain([second], plans)):
        step = predicted_step(plan, heads, cost)
        if step * _TIE < least or (step < least * _TIE and plan.received_rows.sum() < best.received_rows.sum()):
            best, least = plan, step
        if number == 0 and plan is not best and largest_area * cost.step_cell < _BOUND_BY_COMPUTING * least:
            break
    return best
