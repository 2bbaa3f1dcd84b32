"""A page that shows a plan: hover over a slice, pick a rank, step through the stages. One file that needs nothing else."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from magi_attention.mask.bands import area
from magi_attention.plan import AttnPlan
from magi_attention.plan.demand import BEGIN, DST, END, SRC, STAGE, union_by_group
from magi_attention.viz.pieces import planned_pieces

# Pieces beyond which a browser takes long to draw them.
MOST_PIECES = 200_000


def write_page(plan: AttnPlan, path: str | Path, *, title: str = "An attention plan") -> None:
    """Write the page of a plan to ``path``: HTML that asks nothing of the network.

    Hovering over the mask says which cell, slice, rank and stage is under the pointer; the wheel goes closer, to single cells, and
    dragging moves. Ranks and stages can be picked, colours be by rank, stage, piece or number of keys; stepping shows what a rank
    receives from whom before each stage, and what it computes.

    Raises:
        ValueError: more than 200,000 pieces, which a browser draws too slowly: plan larger chunks.
    """
    template = resources.files("magi_attention.viz").joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script that holds the data.
    data = json.dumps(page_data(plan), separators=(",", ":")).replace("</", "<\\/")
    page = template.replace("{{title}}", html.escape(title)).replace("{{data}}", data)
    Path(path).write_text(page, encoding="utf-8")


def page_data(plan: AttnPlan) -> dict[str, Any]:
    """What the page is told: pieces, lengths, and who sends whom how many rows in which stage."""
    pieces = planned_pieces(plan)
    if len(pieces.bands) > MOST_PIECES:
        raise ValueError(
            f"a page shows up to {MOST_PIECES:,} pieces, and this plan has {len(pieces.bands):,}: plan larger chunks, or draw a PNG"
        )
    table = plan.forward.table
    sent = np.stack([table[:, STAGE] + 1, table[:, DST], table[:, SRC], table[:, END] - table[:, BEGIN]], axis=1)
    guests = np.stack(
        [
            -np.ones(len(plan.guests), np.int64),
            plan.guests[:, DST],
            plan.guests[:, SRC],
            plan.guests[:, END] - plan.guests[:, BEGIN],
        ],
        axis=1,
    )
    owned = union_by_group(plan.q_layout.runs[:, 2], plan.q_layout.runs[:, 0], plan.q_layout.runs[:, 1])
    return {
        "num_q": plan.mask.num_q,
        "num_k": plan.mask.num_k,
        "num_ranks": plan.num_ranks,
        "num_stages": plan.num_stages,
        "columns": ["q0", "q1", "k0", "k1", "lo", "hi", "rank", "stage", "cells"],
        "pieces": np.column_stack([pieces.bands, pieces.rank, pieces.stage, area(pieces.bands)]).tolist(),
        "rows": plan.mask.bands.tolist() if len(plan.mask.bands) <= MOST_PIECES else [],
        "transfers": _summed(np.concatenate([sent, guests])),
        "owned": owned.tolist(),
    }


def _summed(transfers: np.ndarray[Any, Any]) -> list[list[int]]:
    """``(stage, to, from, rows)``, one entry for each stage and pair of ranks."""
    keys, inverse = np.unique(transfers[:, :3], axis=0, return_inverse=True)
    rows = np.zeros(len(keys), np.int64)
    np.add.at(rows, inverse.reshape(-1), transfers[:, 3])
    summed: list[list[int]] = np.column_stack([keys, rows]).tolist()
    return summed
