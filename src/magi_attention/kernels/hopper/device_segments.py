"""Segment lists made on the device, of slices that are there: the host never waits for them. See ``kernels.triton.device_lists``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_attention.common.launch import Launcher
from magi_attention.kernels.hopper.segments import NUM_COLUMNS, SegmentList
from magi_attention.kernels.triton.device_lists import load_pieces, places, store_six

_BLOCK = 128
# Segments for which room is made at most, 128 MB of them. Each slice may meet each tile: where that is more, the host has to count.
_MOST_SEGMENTS = 1 << 22


def fits(num_slices: int, num_q: int, tile: int) -> bool:
    """Whether there is room for the segments of any slices of that number."""
    return (num_slices + 1) * -(-num_q // tile) <= _MOST_SEGMENTS


def build_device_segments(bands: Tensor, num_q: int, tile: int, block: int, *, by_key: bool) -> SegmentList:
    """As `build_segments`, of `build_device_bands`'s table; ``by_key``: of its transpose, ``num_q`` being the number of keys.

    ``segments`` is longer than what tiles refer to.
    """
    num_slices, num_tiles = len(bands), -(-num_q // tile)
    assert fits(num_slices, num_q, tile)
    room = num_slices * num_tiles
    segments = torch.empty(room, NUM_COLUMNS, dtype=torch.int32, device=bands.device)
    counts = torch.empty(2, num_tiles, dtype=torch.int64, device=bands.device)  # segments, work
    sizes = (num_slices, num_q, num_tiles)
    constants = {"BY_KEY": by_key, "TILE": tile, "BLOCK": _BLOCK}
    _launch_count(num_tiles, bands.device, (bands, counts, *sizes), {**constants, "STEP": block})
    rows = torch.zeros(num_tiles + 1, dtype=torch.int64, device=bands.device)
    torch.cumsum(counts[0].clamp(min=1), dim=0, out=rows[1:])
    _launch_fill(num_tiles, bands.device, (bands, counts, rows, segments, *sizes), constants)
    order = torch.sort(counts[1], descending=True, stable=True).indices
    return SegmentList(order.to(torch.int32), rows.to(torch.int32), segments)


@triton.jit
def _count_kernel(
    p_bands, p_counts, num_rows, num_q, num_tiles,
    BY_KEY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = 0
    b_work = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_rows, BLOCK):
        _, _, k0, k1, _, _, kept, _ = load_pieces(
            p_bands, first + tl.arange(0, BLOCK), num_rows, num_q, tile, BY_KEY, TILE
        )
        count += tl.sum(kept.to(tl.int32), 0)
        b_work += tl.where(kept, tl.cdiv(k1 - k0, STEP), 0)
    tl.store(p_counts + tile, count)
    tl.store(p_counts + num_tiles + tile, tl.sum(b_work, 0))


@triton.jit
def _store_segments(p, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, mask):
    store_six(p, b_0, b_1, b_2, b_3, b_4, b_5, mask)
    tl.store(p + 6, b_6, mask=mask)
    tl.store(p + 7, b_7, mask=mask)


@triton.jit
def _fill_kernel(
    p_bands, p_counts, p_rows, p_segments, num_rows, num_q, num_tiles,
    BY_KEY: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = tl.load(p_rows + tile).to(tl.int32)
    # A tile that attends nothing has one segment of no cells.
    _store_segments(p_segments + at * 8, 0, 1, 0, 0, 0, -1, 0, 0, tl.load(p_counts + tile) == 0)
    for first in range(0, num_rows, BLOCK):
        q0, q1, k0, k1, lo, hi, kept, whole = load_pieces(
            p_bands, first + tl.arange(0, BLOCK), num_rows, num_q, tile, BY_KEY, TILE
        )
        inner_begin = tl.maximum(k0, q1 - 1 + lo)
        inner_end = tl.where(whole, tl.minimum(k1, q0 + hi + 1), inner_begin)
        _store_segments(p_segments + places(at, kept) * 8, k0, k1, inner_begin, inner_end, lo, hi, q0, q1, kept)
        at += tl.sum(kept.to(tl.int32), 0)


_launch_count = Launcher(_count_kernel)
_launch_fill = Launcher(_fill_kernel)
