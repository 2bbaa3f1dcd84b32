"""What each tile of a Hopper kernel walks: one segment a band, from its first key to its last, in whole blocks.

    tile   /##########\\.      a block is masked unless it lies within [inner_begin, inner_end),
           ./##########\\      which every query of the tile attends
           k0 |inner| k1

Walking a band's full width from ``k0`` takes the fewest blocks, and the pipeline is never drained between edges and inner part. The
transpose (tiles of keys, blocks of queries) is the same with the roles swapped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from magi_attention.mask.bands import Ints, split_q

NUM_COLUMNS = 8


@dataclass(frozen=True)
class SegmentList:
    """Segments by tile.

    ``order``: ``[num_tiles]`` int32 tiles, most work first. ``rows``: ``[num_tiles + 1]`` int32, where each tile's segments begin.
    ``segments``: ``[n, 8]`` int32 ``(k0, k1, inner_begin, inner_end, lo, hi, q0, q1)``. Every tile has one: a tile that attends nothing has
    one of no cells, so that kernels need no case for it.

    What the host knows of slices that it has: ``longest``, the work of the longest tile as a multiple of the mean; ``is_causal``, whether
    most work is of segments that begin later the later the tile, and end where others end.
    """

    order: Tensor
    rows: Tensor
    segments: Tensor
    longest: float = 1.0
    is_causal: bool = False

    @property
    def num_tiles(self) -> int:
        return len(self.order)

    def to(self, device: torch.device) -> SegmentList:
        """The same on ``device``, without waiting for it: from pinned memory, which is not given to others before it was copied."""

        def moved(x: Tensor) -> Tensor:
            return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

        return replace(self, order=moved(self.order), rows=moved(self.rows), segments=moved(self.segments))


def build_segments(bands: Ints, num_q: int, tile: int, block: int) -> SegmentList:
    """The list of tiles of ``tile`` queries that step through keys by ``block``. ``bands``: ``[n, 6]``, tight."""
    num_tiles = -(-num_q // tile)
    starts = np.arange(num_tiles) * tile
    ends = np.minimum(starts + tile, num_q)
    pieces, _, at = split_q(bands, starts, ends)
    q0, q1, k0, k1, lo, hi = pieces.T
    whole = (q0 == starts[at]) & (q1 == ends[at])
    inner_begin = np.maximum(k0, q1 - 1 + lo)
    inner_end = np.where(whole, np.minimum(k1, q0 + hi + 1), inner_begin)
    segments = np.stack([k0, k1, inner_begin, inner_end, lo, hi, q0, q1], axis=1)

    blocks = -(-(k1 - k0) // block)
    work = np.zeros(num_tiles, np.int64)
    np.add.at(work, at, blocks)
    begin_moves, end_moves = q1 - 1 + lo > k0, q0 + hi < k1 - 1
    idle = np.flatnonzero(work == 0)
    nothing = np.array([0, 1, 0, 0, 0, -1, 0, 0])
    segments = np.concatenate([segments, np.broadcast_to(nothing, (len(idle), NUM_COLUMNS))])
    at = np.concatenate([at, idle])
    by_tile = np.argsort(at, kind="stable")
    rows = np.searchsorted(at[by_tile], np.arange(num_tiles + 1))
    order = np.argsort(-work, kind="stable")
    total = max(1, int(work.sum()))
    return SegmentList(
        torch.from_numpy(order.astype(np.int32)),
        torch.from_numpy(rows.astype(np.int32)),
        torch.from_numpy(segments[by_tile].astype(np.int32)),
        longest=int(work.max(initial=1)) * num_tiles / total,
        is_causal=2 * int(blocks[begin_moves & ~end_moves].sum()) > total,
    )
