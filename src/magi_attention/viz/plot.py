"""The mask of a plan as a picture, coloured by rank or by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from magi_attention.mask.draw import Pieces, draw, hue_to_rgb, slice_colours
from magi_attention.plan import AttnPlan
from magi_attention.viz.pieces import GUEST, planned_pieces

_HOST_COLOUR, _GUEST_COLOUR = "#9aa5b1", "#d62728"
# Remote stages, the first first.
_STAGE_HUES = (0.58, 0.09, 0.36, 0.83, 0.14, 0.47, 0.95, 0.69)


def plot_plan(
    plan: AttnPlan, path: str | Path | None = None, *, color_by: str = "rank", title: str | None = None
) -> Any:
    """A picture of the plan's mask, each cell in the colour of the rank, or of the stage, that computes it.

    Args:
        path: where to write it: PNG, SVG or what else matplotlib writes, by its ending. None: nowhere.
        color_by: "rank", or "stage" (of the forward pass: what a rank computes with its own keys, and with those that arrive in each
            stage). "slice" and "type" are those of `AttnMask.plot`.
        title: left out, the lengths, the ranks and their balance.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: another ``color_by``.
        ImportError: matplotlib is not installed.
    """
    mask = plan.mask
    title = title or (
        f"{mask.num_q:,} queries x {mask.num_k:,} keys on {plan.num_ranks:,} ranks, "
        f"the busiest with {plan.imbalance:.3f} times the mean of cells"
    )
    if color_by in ("slice", "type"):
        return mask.plot(path, color_by=color_by, title=title)
    if color_by not in ("rank", "stage"):
        raise ValueError(f'color_by must be "rank", "stage", "slice" or "type", got {color_by!r}')
    planned = planned_pieces(plan)
    if color_by == "rank":
        names = tuple(f"rank {rank}" for rank in range(plan.num_ranks))
        pieces = Pieces(planned.bands, planned.rank, names, title, "computed by")
        return draw(pieces, mask.num_q, mask.num_k, path, slice_colours(plan.num_ranks))
    names = ("own keys", *(f"keys of stage {stage + 1}" for stage in range(plan.num_stages)), "moved queries")
    group = np.where(planned.stage == GUEST, len(names) - 1, planned.stage)
    remote = [hue_to_rgb(_STAGE_HUES[stage % len(_STAGE_HUES)]) for stage in range(plan.num_stages)]
    colours = [_HOST_COLOUR, *remote, _GUEST_COLOUR]
    return draw(Pieces(planned.bands, group, names, title, "computed with"), mask.num_q, mask.num_k, path, colours)
