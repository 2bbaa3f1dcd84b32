"""Masks as pictures, drawn from rows: the cost does not grow with the length. Needs matplotlib, which is imported where it is used.

A row is a polygon of at most six corners. Cell ``(i, j)`` is the square ``[j, j + 1] x [i, i + 1]``; the slanted sides run through the
corners of cells, half a cell outside the last diagonal's middle, so that a polygon holds the middles of exactly the row's cells. Small
masks are drawn as stairs instead, cell by cell along their edges.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints, bands_from_slices, slices_from_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

Floats = NDArray[np.float64]

TYPE_NAMES = ("full", "causal", "inv_causal", "bi_causal")
_TYPE_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
# Up to this many queries and keys, the edges of polygons are stairs.
_MOST_TOKENS_OF_STAIRS = 128
_MOST_NAMES_IN_LEGEND, _NAMES_IN_COLUMN = 72, 36


@dataclass(frozen=True, eq=False)
class Pieces:
    """What is drawn: ``bands`` ``[n, 6]``, ``group`` ``[n]`` index into ``names``, which say what has which colour, and ``legend``
    what colours tell."""

    bands: Ints
    group: Ints
    names: tuple[str, ...]
    title: str
    legend: str = ""


def plot(mask: AttnMask, path: str | Path | None = None, *, color_by: str = "slice", title: str | None = None) -> Any:
    """A picture of the mask, queries downwards and keys to the right.

    Args:
        path: where to write it: PNG, SVG or what else matplotlib writes, by its ending. None: nowhere.
        color_by: "slice" (each row of the table a colour of its own, also where it takes several slices of the four types to write it)
            or "type" (the four types of slices). For colours by rank or stage, see `magi_attention.viz.plot_plan`.
        title: left out, the lengths and how much is attended.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: another ``color_by``.
        ImportError: matplotlib is not installed.
    """
    if color_by not in ("slice", "type"):
        raise ValueError(
            f'color_by must be "slice" or "type", got {color_by!r}; for "rank" and "stage", plan the mask and use '
            "magi_attention.viz.plot_plan"
        )
    title = title or f"{mask.num_q:,} queries x {mask.num_k:,} keys, {1 - mask.sparsity:.2%} attended"
    if color_by == "slice":
        count = len(mask.bands)
        pieces = Pieces(mask.bands, np.arange(count), tuple(f"slice {at}" for at in range(count)), title, "slices")
        return draw(pieces, mask.num_q, mask.num_k, path, slice_colours(count))
    q_ranges, k_ranges, types = slices_from_bands(mask.bands)
    pieces = Pieces(bands_from_slices(q_ranges, k_ranges, types), types, TYPE_NAMES, title, "type of slice")
    return draw(pieces, mask.num_q, mask.num_k, path, _TYPE_COLOURS)


def draw(pieces: Pieces, num_q: int, num_k: int, path: str | Path | None, colours: Sequence[Any]) -> Any:
    """A figure of the pieces, ``colours`` ``[len(pieces.names)]``; see `plot`."""
    figure_class, canvas_class, polygons_class, patch_class, formatter = _matplotlib()
    # Half to twice as wide as high.
    ratio = min(max(num_k / max(num_q, 1), 0.5), 2.0)
    figure = figure_class(figsize=(6 * max(ratio, 1) + 1.8, 6 * max(1 / ratio, 1) + 0.8), dpi=150, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    stairs = max(num_q, num_k) <= _MOST_TOKENS_OF_STAIRS
    outlines = [corners(band, stairs) for band in pieces.bands]
    used = np.unique(pieces.group)
    face = [colours[at] for at in pieces.group]
    # A thin edge in the same colour: what is narrower than a pixel shows all the same.
    axes.add_collection(polygons_class(outlines, facecolors=face, edgecolors=face, linewidths=0 if stairs else 0.4))
    axes.set(xlim=(0, max(num_k, 1)), ylim=(max(num_q, 1), 0), xlabel="keys", ylabel="queries")
    axes.set_aspect("equal" if 0.5 <= num_k / max(num_q, 1) <= 2 else "auto")
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    if stairs and max(num_q, num_k) <= 40:
        axes.set_xticks(np.arange(num_k + 1), minor=True)
        axes.set_yticks(np.arange(num_q + 1), minor=True)
        axes.grid(which="both", color="#bbbbbb", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(formatter.MaxNLocator(6, integer=True))
        axis.set_major_formatter(formatter.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    many = len(used) > _MOST_NAMES_IN_LEGEND
    colour_key = f"\n{pieces.names[used[0]]} to {pieces.names[used[-1]]}, a colour each" if many else ""
    axes.set_title(pieces.title + colour_key, fontsize=10, pad=8)
    if len(used) and not many:
        handles = [patch_class(color=colours[at], label=pieces.names[at]) for at in used]
        options = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "ncols": -(-len(used) // _NAMES_IN_COLUMN)}
        # Beside the axes, not outside of the figure's layout, so that it begins where they do.
        axes.legend(
            handles=handles,
            title=pieces.legend,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            alignment="left",
            **options,
        )
    if path is not None:
        figure.savefig(path, bbox_inches="tight")
    return figure


def corners(band: Ints, stairs: bool = False) -> Floats:
    """``[n, 2]``: the outline ``(key, query)`` of one row, clockwise from its upper left; with ``stairs``, along its cells."""
    q0, q1, k0, k1, lo, hi = (int(value) for value in band)
    if stairs:
        query = np.arange(q0, q1)
        left, right = np.maximum(k0, query + lo), np.minimum(k1, query + hi + 1)
        edges = np.stack([query, query + 1], axis=1).reshape(-1)
        down = np.stack([np.repeat(right, 2), edges], axis=1)
        up = np.stack([np.repeat(left, 2), edges], axis=1)[::-1]
        return np.concatenate([down, up]).astype(np.float64)
    # Half a cell outside the last diagonal's middles; no cut where the diagonal only meets the corner of the rectangle.
    upper = hi + 0.5 if hi < k1 - 1 - q0 else k1 - q0
    lower = lo - 0.5 if lo > k0 - q1 + 1 else k0 - q1
    points = [
        (k0, q0),
        (min(k1, q0 + upper), q0),
        (k1, min(q1, max(q0, k1 - upper))),
        (k1, q1),
        (max(k0, q1 + lower), q1),
        (k0, max(q0, min(q1, k0 - lower))),
    ]
    return np.array(points, np.float64)


def slice_colours(count: int) -> list[Any]:
    """Colours in turn, neighbours unlike each other."""
    # Steps of the golden ratio around the circle of hues, darker and lighter where they come near each other again.
    hues = (np.arange(count) * 0.61803398875 + 0.58) % 1
    return [hue_to_rgb(hue, (0.55, 0.38, 0.72)[at // 8 % 3]) for at, hue in enumerate(hues.tolist())]


def hue_to_rgb(hue: float, lightness: float = 0.55) -> tuple[float, float, float]:
    """A colour of middling saturation; ``hue`` and ``lightness`` in [0, 1)."""
    return colorsys.hls_to_rgb(hue, lightness, 0.6)


def _matplotlib() -> tuple[Any, Any, Any, Any, Any]:
    try:
        from matplotlib import ticker
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "magi_attention[plot]"') from error
    return Figure, FigureCanvasAgg, PolyCollection, Patch, ticker
