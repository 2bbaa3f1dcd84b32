"""Pictures colour exactly the attended cells, each in the colour of its row or type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_cases import any_mask
from matplotlib.colors import to_rgb

from magi_attention.mask import AttnMask, draw
from magi_attention.mask.bands import to_dense

COLOURS = [(1, 0, 0), (0, 0.5, 0), (0, 0, 1), (0.8, 0.8, 0), (0, 0.8, 0.8), (0.8, 0, 0.8)]


def colours_of_cells(figure: Any, num_q: int, num_k: int) -> np.ndarray:
    """``[num_q, num_k, 3]``: the colour of each cell's middle, in 0..255."""
    axes = figure.axes[0]
    axes.grid(visible=False, which="both")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    key, query = np.meshgrid(np.arange(num_k) + 0.5, np.arange(num_q) + 0.5)
    at = axes.transData.transform(np.stack([key.ravel(), query.ravel()], axis=1)).astype(int)
    return pixels[pixels.shape[0] - 1 - at[:, 1], at[:, 0], :3].reshape(num_q, num_k, 3).astype(int)


@pytest.mark.parametrize("stairs", [True, False])
def test_pictures_colour_the_attended_cells(stairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(51)
    monkeypatch.setattr(draw, "_MOST_TOKENS_OF_STAIRS", 1000 if stairs else 0)
    for _ in range(15):
        mask = any_mask(rng)
        if not mask.num_q or not mask.num_k:
            continue
        group = np.arange(len(mask.bands)) % len(COLOURS)
        pieces = draw.Pieces(mask.bands, group, tuple("abcdef"), "")
        figure = draw.draw(pieces, mask.num_q, mask.num_k, None, COLOURS)
        seen = colours_of_cells(figure, mask.num_q, mask.num_k)
        expected = np.full(seen.shape, 255)
        for at, band in enumerate(mask.bands):
            expected[to_dense(band[None], mask.num_q, mask.num_k) > 0] = (np.array(COLOURS[at % 6]) * 255).round()
        assert np.abs(seen - expected).max() <= 1, mask.bands.tolist()


def test_types_have_their_colours() -> None:
    mask = AttnMask.from_slices([(0, 4), (4, 8), (8, 12), (12, 16)], [(0, 6)] * 4, [0, 1, 2, 3])
    seen = colours_of_cells(mask.plot(color_by="type"), 16, 6)
    for kind, row in enumerate((0, 4, 8, 12)):
        name = draw._TYPE_COLOURS[kind]
        attended = mask.to_dense()[row]
        assert np.abs(seen[row][attended] - np.array(to_rgb(name)) * 255).max() <= 1


def test_a_sliver_of_a_long_mask_shows() -> None:
    million = 1 << 20
    mask = AttnMask.from_slices([(million // 2, million // 2 + 1)], [(0, million)], 0, million, million)
    figure = mask.plot()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    axes_at = figure.axes[0].get_window_extent()
    middle = pixels.shape[0] - round((axes_at.y0 + axes_at.y1) / 2)
    line = pixels[middle - 2 : middle + 2, round(axes_at.x0) + 5 : round(axes_at.x1) - 5]
    assert (line.min(axis=(0, 2)) < 250).all()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_files(ending: str, tmp_path: Path) -> None:
    AttnMask.sliding_window(1 << 20, (5000, 0)).plot(tmp_path / f"mask.{ending}", color_by="type")
    start = (tmp_path / f"mask.{ending}").read_bytes()[:200]
    assert {"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending] in start


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match=r"magi_attention\.viz\.plot_plan"):
        AttnMask.causal(4).plot(color_by="rank")


def test_masks_of_nothing() -> None:
    AttnMask.full(0, 0).plot()
    AttnMask.full(5, 0).plot(color_by="type")
