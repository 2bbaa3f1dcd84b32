"""The predicted step of a plan, and the choice between plans by it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from magi_attention.mask import AttnMask
from magi_attention.plan.cost import (
    CostModel,
    Heads,
    Workload,
    backward_times,
    best_time,
    forward_times,
    is_better,
    step_time,
)
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.plan import AttnPlan, areas_of
from magi_attention.plan.traffic import rows_moved
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


Choice = TypeVar("Choice")


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


@dataclass(frozen=True)
class Prediction:
    """What plans are chosen by: the predicted step, rows received in all, and the largest area of a rank."""

    step: float
    rows: int
    largest_area: int


def prediction(plan: AttnPlan, heads: Heads, cost: CostModel) -> Prediction:
    return Prediction(predicted_step(plan, heads, cost), int(plan.received_rows.sum()), int(plan.areas.max()))


def prediction_of_one_stage(
    mask: AttnMask, q_layout: ShardLayout, k_layout: ShardLayout, cost: CostModel
) -> Prediction:
    """What `prediction` says of these layouts' plan where keys arrive in one stage, over links that are all alike; no plan is made."""
    received, sent = rows_moved(mask.bands, q_layout, k_layout)
    areas, home = areas_of(mask, q_layout), cells_at_home(mask.bands, q_layout, k_layout)
    num_stages = int(received.any())
    rows = np.maximum(received, sent)[None].astype(np.float64)[:num_stages]
    cells = (areas - home)[None].astype(np.float64)[:num_stages]
    work = Workload(home.astype(np.float64), cells, rows, np.zeros_like(rows))
    return Prediction(step_time(work, cost), int(received.sum()), int(areas.max()))


def fastest(choices: Iterator[Choice], predict: Callable[[Choice], Prediction], cost: CostModel) -> Choice:
    """The choice of the least predicted step, and among equals the fewest rows received, then the first.

    ``choices``: one; or one that moves little, another that balances areas better, and then, which are made only where balance may matter
    more, others between those.
    """
    best = next(choices)
    second = next(choices, None)
    if second is None:
        return best
    least = predict(best)
    largest_area = least.largest_area
    for number, choice in enumerate(itertools.chain([second], choices)):
        one = predict(choice)
        is_second_best = not is_better(one.step, one.rows, least.step, least.rows)
        if not is_second_best:
            best, least = choice, one
        if number == 0 and is_second_best and largest_area * cost.step_cell < _BOUND_BY_COMPUTING * least.step:
            break
    return best
