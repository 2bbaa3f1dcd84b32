"""What each tile of a kernel visits: the band table, sorted by tile, vectorised.

For a tile of queries, a row of the table is up to three segments of keys: an *inner* one that every query of the tile attends, whole blocks
long, for which the kernel needs no mask; and the slanted or ragged *edges* beside it, for which it does.

    tile   ##########\\.      inner: as many whole blocks as fit the full part
           ###########\\      edges: the rest
           |inner|edge|

The transpose (tiles of keys, segments of queries) is the same with the roles swapped, a diagonal ``j - i`` being ``-(i - j)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from magi_attention.mask.bands import Ints, split_q

# Columns of the edge table: keys [BEGIN, END) masked by lo <= j - i <= hi and q_begin <= i < q_end.
NUM_EDGE_COLUMNS = 6


@dataclass(frozen=True)
class WorkList:
    """Segments by tile.

    ``order``: ``[num_tiles]`` int32 tiles, most work first. ``inner_rows``, ``edge_rows``: ``[num_tiles, 2]`` int32, where each tile's
    segments begin and end in ``inner``: ``[n, 2]`` int32 ``(begin, end)``, a multiple of the block long, and in ``edges``: ``[m, 6]``
    int32 ``(begin, end, lo, hi, q_begin, q_end)``.
    """

    order: Tensor
    inner_rows: Tensor
    inner: Tensor
    edge_rows: Tensor
    edges: Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.order)

    def to(self, device: torch.device) -> WorkList:
        """The same on ``device``."""
        return WorkList(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def transpose(bands: Ints) -> Ints:
    """The table with queries and keys swapped: ``i - j`` lies in ``[-hi, -lo]``."""
    swapped = bands[:, [2, 3, 0, 1, 5, 4]].copy()
    swapped[:, 4:] *= -1
    return swapped


def build_work_list(bands: Ints, num_q: int, tile: int, block: int) -> WorkList:
    """The list of tiles of ``tile`` queries that step through keys by ``block``. ``bands``: ``[n, 6]``, tight."""
    num_tiles = -(-num_q // tile)
    starts = np.arange(num_tiles) * tile
    ends = np.minimum(starts + tile, num_q)
    pieces, _, at = split_q(bands, starts, ends)
    q0, q1, k0, k1, lo, hi = pieces.T
    whole = (q0 == starts[at]) & (q1 == ends[at])
    inner_begin = np.maximum(k0, q1 - 1 + lo)
    num_blocks = np.where(whole, np.maximum(np.minimum(k1, q0 + hi + 1) - inner_begin, 0) // block, 0)
    inner_begin = np.where(num_blocks > 0, inner_begin, k1)
    inner_end = inner_begin + num_blocks * block

    has_inner = num_blocks > 0
    inner_tile, inner = at[has_inner], np.stack([inner_begin, inner_end], axis=1)[has_inner]
    left = np.stack([k0, inner_begin, lo, hi, q0, q1], axis=1)
    right = np.stack([np.maximum(inner_end, k0), k1, lo, hi, q0, q1], axis=1)
    edges, edge_tile = np.concatenate([left, right]), np.concatenate([at, at])
    kept = edges[:, 0] < edges[:, 1]
    edges, edge_tile = edges[kept], edge_tile[kept]

    work = np.zeros(num_tiles, np.int64)
    np.add.at(work, inner_tile, inner[:, 1] - inner[:, 0])
    np.add.at(work, edge_tile, 2 * (edges[:, 1] - edges[:, 0] + block))  # an edge block costs more than an inner one
    inner_rows, inner = _by_tile(inner_tile, inner, num_tiles)
    edge_rows, edges = _by_tile(edge_tile, edges, num_tiles)
    order = np.argsort(-work, kind="stable")
    return WorkList(*(torch.from_numpy(x.astype(np.int32)) for x in (order, inner_rows, inner, edge_rows, edges)))


def _by_tile(tile: Ints, rows: Ints, num_tiles: int) -> tuple[Ints, Ints]:
    order = np.argsort(tile, kind="stable")
    begins = np.searchsorted(tile[order], np.arange(num_tiles + 1))
    return np.stack([begins[:-1], begins[1:]], axis=1), np.ascontiguousarray(rows[order])
