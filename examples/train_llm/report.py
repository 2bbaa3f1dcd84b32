"""What the demo says when it is done: drawings for a terminal, a table, and whether the runs agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from magi_attention.plan import AttnPlan
from train import Record

# Bounds on the relative difference between the runs.
FIRST_STEP = 1e-5
LATER_STEPS = 1e-3

WHY_LOSSES_DRIFT = f"""\
Every rank adds up its own rows, so the sums of many ranks are taken in another order than those of one and round differently in
their last digits. The optimiser feeds that back: Adam divides each gradient by its own size, so where a gradient is nearly zero
its rounding decides where the weight goes, and each step starts from weights that differ a little more. So the first step is held
to {FIRST_STEP:g}, later losses to {LATER_STEPS:g}. In float64, where roundings are half a billion times smaller, the
same runs agree to 1e-9
on every step (tests/test_demo.py)."""

# Colours 1 to 6 of a terminal, by rank.
_COLOURS = (34, 33, 32, 31, 35, 36)


def draw_owners(plan: AttnPlan, num_rows: int = 32, num_columns: int = 48, colour: bool = False) -> list[str]:
    """Lines that show the mask, each attended field as the digit of the rank that computes it: queries down, keys across."""
    layout = plan.q_layout
    is_attended = plan.mask.coverage(num_rows, num_columns) > 0
    # The chunk in the middle of a row of fields stands for it.
    middles = (np.arange(num_rows) + 0.5) * plan.mask.num_q / num_rows
    owners = layout.owner[middles.astype(np.int64) // layout.chunk_size]
    lines = [f"┌{'─' * num_columns}┐"]
    for owner, row in zip(owners.tolist(), is_attended, strict=True):
        text = "".join(f"{owner % 10}" if attended else " " for attended in row)
        lines.append(f"│\033[{_COLOURS[owner % len(_COLOURS)]}m{text}\033[0m│" if colour else f"│{text}│")
    return [*lines, f"└{'─' * num_columns}┘"]


def draw_side_by_side(plans: tuple[AttnPlan, AttnPlan], colour: bool) -> str:
    """The masks of the causal and of the windowed layers."""
    left, right = (draw_owners(plan, colour=colour) for plan in plans)
    titles = f"{'  causal layers':<52}  windowed layers"
    return "\n".join([titles, *(f"{a}  {b}" for a, b in zip(left, right, strict=True))])


def relative_differences(one: Record, many: Record) -> list[float]:
    """Of the loss, step by step."""
    return [abs(a - b) / abs(a) for a, b in zip(one.losses, many.losses, strict=True)]


def gradient_difference(one: Record, many: Record) -> tuple[float, str]:
    """The largest ``|a - b| / |a|`` over the parameters' first gradients, in the Euclidean norm, and whose it is."""
    return max(
        (((gradient - many.first_gradients[name]).norm() / gradient.norm()).item(), name)
        for name, gradient in one.first_gradients.items()
    )


def loss_table(one: Record, many: Record, num_ranks: int, num_blocks: int = 2) -> str:
    """Loss per step on one rank and on many, in a few blocks side by side."""
    header = f"{'step':>4} {'1 rank':>11} {f'{num_ranks} ranks':>11} {'difference':>10}"
    rows = [
        f"{step:>4} {a:>11.7f} {b:>11.7f} {difference:>10.1e}"
        for step, (a, b, difference) in enumerate(
            zip(one.losses, many.losses, relative_differences(one, many), strict=True), start=1
        )
    ]
    height = -(-len(rows) // num_blocks)
    lines = ["   ".join([header] * -(-len(rows) // height))]
    lines += ["   ".join(rows[first::height]) for first in range(height)]
    return "\n".join(lines)


def balance_table(many: Record, num_ranks: int) -> str:
    """Balance and traffic of all steps, for each kind of layer."""
    lines = [
        f"{'':<18} {'largest area / mean':>22} {'rows received, a layer and step':>34} {'a ring moves':>14} {'share':>7}"
    ]
    lines.append(f"{'':<18} {'mean':>11}{'worst':>11} {'all ranks':>17}{'busiest rank':>17}")
    for name, plans in zip(("causal layers", "windowed layers"), zip(*many.plans, strict=True), strict=True):
        lines.append(_balance_row(name, plans))
    return "\n".join(lines)


def _balance_row(name: str, plans: Sequence[AttnPlan]) -> str:
    imbalances = [plan.imbalance for plan in plans]
    received = np.array([plan.received_rows for plan in plans])  # [num_steps, num_ranks]
    ring = np.mean([plan.ring_rows for plan in plans])
    mean = received.sum(axis=1).mean()
    return (
        f"{name:<18} {np.mean(imbalances):>11.3f}{np.max(imbalances):>11.3f} {mean:>17,.0f}{received.max(axis=1).mean():>17,.0f} "
        f"{ring:>14,.0f} {mean / max(ring, 1):>7.1%}"
    )


def disagreements(one: Record, many: Record) -> list[str]:
    """What is further apart than it may be; nothing if all agrees."""
    found = []
    first, *later = relative_differences(one, many)
    if first > FIRST_STEP:
        found.append(f"the first loss differs by {first:.1e}, allowed is {FIRST_STEP:g}")
    difference, name = gradient_difference(one, many)
    if difference > FIRST_STEP:
        found.append(f"the first gradient of {name} differs by {difference:.1e}, allowed is {FIRST_STEP:g}")
    if max(later, default=0.0) > LATER_STEPS:
        found.append(f"a later loss differs by {max(later):.1e}, allowed is {LATER_STEPS:g}")
    return found
