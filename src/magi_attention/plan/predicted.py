"""The predicted step of a plan, and the choice between plans by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from magi_attention.plan.cost import CostModel, Heads, Workload, backward_times, best_time, forward_times, is_better
from magi_attention.plan.plan import AttnPlan
from magi_attention.plan.workload import (
    Dealing,
    WorkDensity,
    apart_by_node,
    cells_at_home,
    predict,
    rows_by_stage,
)

# Where computing is less than this share of the step of a plan that moves little, plans that balance better are not looked at.
_BOUND_BY_COMPUTING = 0.9


def workloads(plan: AttnPlan, heads: Heads, cost: CostModel) -> tuple[Workload, Workload]:
    """What every rank does, forward and backward."""
    home = cells_at_home(plan.mask.bands, plan.q_layout, plan.k_layout)
    density = None
    if max(plan.forward.num_stages, plan.backward.num_stages) > 1:
        density = WorkDensity.of(plan.mask.bands, plan.q_layout, plan.k_layout.padded_seqlen)
    relayed = plan.ranks_per_node is not None
    nodes = plan.ranks_per_node if relayed else cost.ranks_per_node

    at_home = plan.areas if plan.guest_cells is None else plan.areas - plan.guest_cells[1]

    def of(dealing: Dealing) -> Workload:
        work = predict(dealing, at_home, home, density, plan.k_layout, ranks_per_node=nodes, relayed=relayed)
        return work if plan.guest_cells is None else _with_guests(work, plan, heads, nodes)

    forward = of(plan.forward)
    return forward, forward if plan.backward is plan.forward else of(plan.backward)


def _with_guests(work: Workload, plan: AttnPlan, heads: Heads, ranks_per_node: int | None) -> Workload:
    """Guests are a stage of their own, the first; their rows go there and back, counted in rows of keys of as many bytes."""
    assert plan.guest_cells is not None
    within, between = apart_by_node(plan.guests, ranks_per_node)
    both_ways = 2 * heads.query_bytes / heads.key_bytes
    rows, crossing = (rows_by_stage(table, 1, plan.num_ranks) * both_ways for table in (within, between))
    return replace(
        work,
        stage_cells=np.concatenate([plan.guest_cells[1][None], work.stage_cells]),
        stage_rows=np.concatenate([rows, work.stage_rows]),
        stage_between=np.concatenate([crossing, work.stage_between]),
    )


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
        (dealing, one)[best_time((float(times(many, cost).max()), float(times(few, cost).max())))]
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
        if is_better(step, int(plan.received_rows.sum()), least, int(best.received_rows.sum())):
            best, least = plan, step
        if number == 0 and plan is not best and largest_area * cost.step_cell < _BOUND_BY_COMPUTING * least:
            break
    return best
