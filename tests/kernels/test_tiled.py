"""What is the tiled kernel's own: how it cuts a mask, and what it never holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from magi_attention.kernels import tiled
from magi_attention.kernels.tiled import cut_tiles
from magi_attention.testing.kernel_check import KernelCase, check_kernel, make_inputs, run_kernel
from magi_attention.testing.mask_families import MASK_FAMILIES, Slices, random_slices


def check_cut(slices: Slices, tile_q: int, tile_k: int) -> None:
    """The tiles' pieces are the mask, each cell once; each is within a tile, and tight; only those with a corner cut off have bounds."""
    mask = slices.kernel_mask()
    count = np.zeros((mask.num_q, mask.num_k), np.int64)
    seen = set()
    for tile in cut_tiles(mask, tile_q, tile_k):
        assert tile.q0 % tile_q == 0 and tile.q1 == min(tile.q0 + tile_q, mask.num_q) and tile.q0 not in seen
        seen.add(tile.q0)
        assert tile.pieces
        for piece in tile.pieces:
            assert 0 <= piece.start < piece.end <= tile.q1 - tile.q0 and 0 < piece.k1 - piece.k0 <= tile_k
            y_minus_x = np.arange(piece.k1 - piece.k0) - np.arange(piece.end - piece.start)[:, None]
            cells = np.ones_like(y_minus_x, dtype=bool)
            if piece.lo is not None:
                cells &= y_minus_x >= piece.lo
            if piece.hi is not None:
                cells &= y_minus_x <= piece.hi
            assert cells.any(axis=0).all() and cells.any(axis=1).all(), "each of a piece's queries and keys has a cell"
            assert cells.all() == (piece.lo is None and piece.hi is None)
            count[tile.q0 + piece.start : tile.q0 + piece.end, piece.k0 : piece.k1] += cells
    assert np.array_equal(count, slices.dense().numpy().astype(np.int64))


@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_tiles_hold_the_mask(family: str) -> None:
    for tile_q, tile_k in ((16, 64), (64, 16), (1000, 1000)):
        check_cut(MASK_FAMILIES[family](149), tile_q, tile_k)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 70))
def test_tiles_hold_any_mask(num_q: int, num_k: int, seed: int, tile_q: int, tile_k: int) -> None:
    check_cut(random_slices(num_q, num_k, seed), tile_q, tile_k)


@pytest.mark.parametrize("family", ["causal", "shared_prefix", "random_b", "split_by_diagonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_small_tiles(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype) -> None:
    """Many tiles of every kind at a length at which mistakes between tiles show."""
    monkeypatch.setattr(tiled, "_TILE_K", 24)
    monkeypatch.setattr(tiled, "_MAX_TILE_Q", 16)
    check_kernel(tiled, KernelCase(family, dtype, 149, head_dim=32, softcap=10.0))


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return result


@pytest.mark.parametrize("heads", [(2, 2), (16, 1)], ids=str)
def test_nothing_is_larger_than_the_inputs_or_a_tile(heads: tuple[int, int]) -> None:
    case = KernelCase("window", torch.bfloat16, 3001, *heads, head_dim=16)
    inputs, mask = make_inputs(case), case.slices.kernel_mask()
    with LargestTensor() as largest:
        run_kernel(tiled, inputs, mask, case.settings)
    assert largest.num_elements <= max(inputs.q.numel(), tiled._MAX_LOGITS)
