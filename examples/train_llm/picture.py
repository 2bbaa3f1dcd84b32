"""The demo's picture: both masks coloured by the rank that computes each field, loads, and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # a file is wanted, not a window

import numpy as np
from matplotlib import pyplot as plt

from magi_attention.plan import AttnPlan
from train import Record

_NUM_FIELDS = 512  # of a side of a drawn mask


def draw_mask(axes: Any, plan: AttnPlan, title: str, colours: Any) -> None:
    """Queries down, keys across; the darker, the more of a field is attended, and nothing where nothing is."""
    mask, layout = plan.mask, plan.q_layout
    num_rows, num_columns = min(_NUM_FIELDS, mask.num_q), min(_NUM_FIELDS, mask.num_k)
    middles = (np.arange(num_rows) + 0.5) * mask.num_q / num_rows
    owners = layout.owner[middles.astype(np.int64) // layout.chunk_size]
    image = np.empty((num_rows, num_columns, 4))
    image[..., :3] = colours[owners][:, None, :3]
    share = mask.coverage(num_rows, num_columns)
    image[..., 3] = np.where(share > 0, 0.35 + 0.65 * share, 0.0)
    axes.imshow(image, extent=(0, mask.num_k, mask.num_q, 0), interpolation="nearest", aspect="equal")
    axes.set_title(title)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def draw_loads(axes: Any, plans: tuple[AttnPlan, AttnPlan], colours: Any) -> None:
    """Each rank's share of the mean area, for both masks."""
    ranks = np.arange(plans[0].num_ranks)
    for offset, plan, hatch in zip((-0.2, 0.2), plans, ("", "//"), strict=True):
        axes.bar(
            ranks + offset, plan.areas / plan.areas.mean(), 0.38, color=colours[ranks], edgecolor="white", hatch=hatch
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.set_title("area of each rank / mean (hatched: windowed layers)")


def draw_losses(axes: Any, one: Record, many: Record, num_ranks: int) -> None:
    """Both curves; they should lie on each other."""
    steps = np.arange(1, len(one.losses) + 1)
    axes.plot(steps, one.losses, color="0.7", linewidth=5, label="1 rank")
    axes.plot(steps, many.losses, color="black", linewidth=1.2, label=f"{num_ranks} ranks")
    axes.set_title("loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a byte")
    axes.legend()


def save_picture(path: Path, one: Record, many: Record) -> None:
    """A PNG of the last step's masks and of the whole run."""
    plans = many.plans[-1]
    num_ranks = plans[0].num_ranks
    colours = plt.get_cmap("tab10" if num_ranks <= 10 else "turbo", num_ranks if num_ranks > 10 else None)(
        np.arange(num_ranks)
    )
    figure, axes = plt.subplots(2, 2, figsize=(12, 11), height_ratios=(1.4, 1), layout="constrained")
    draw_mask(axes[0, 0], plans[0], "causal layers, by the rank that computes", colours)
    draw_mask(axes[0, 1], plans[1], "windowed layers, the same dispatch", colours)
    draw_loads(axes[1, 0], plans, colours)
    draw_losses(axes[1, 1], one, many, num_ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
