"""Work lists made on the device, of slices that are there: the host never waits for them.

How long the lists are is only known to the device, so room is made by the shapes alone. Three kernels, one program a tile where it says so:

    prepare    slices      -> band table, tight, in the order given; clamped to the tensors
    count      one a tile  -> how many segments of each kind it has, and how much work that is
    fill       one a tile  -> its segments, at the places that the running sums of the counts say

The lists hold what `build_work_list` makes of the same slices, in the same order. A tile whose segments find no room walks the whole band
table instead: slow, and right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_attention.common.launch import Launcher
from magi_attention.kernels.triton.work_lists import NUM_EDGE_COLUMNS, WorkList

# Rows of the band table that a program looks at together.
_BLOCK = 128
# Room for segments: so many a tile, and so many a slice, unless all slices meet all tiles in less. Slices of documents, windows and blocks
# meet a tile in a handful; 256 slices that each span all queries fill it. Of what is reserved only what is used is touched.
_ROOM_PER_TILE, _ROOM_PER_SLICE = 256, 2
# What is counted for a tile: inner segments, edges, edges left of inner segments, work.
_NUM_COUNTS, _WORK = 4, 3


def build_device_bands(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int, num_k: int) -> Tensor:
    """``[n, 6]`` int32 rows of slices, tight; a slice that attends nothing is a row of zeros.

    Ranges that leave the tensors are clamped to them: what they attend is not defined, but nothing outside is read or written.
    """
    num_slices = len(q_ranges)
    bands = torch.empty(num_slices, 6, dtype=torch.int32, device=q_ranges.device)
    if num_slices:
        q_ranges, k_ranges = q_ranges.contiguous(), k_ranges.contiguous()
        given = q_ranges if types is None else types.contiguous()
        _launch_prepare(
            triton.cdiv(num_slices, _BLOCK), bands.device, (q_ranges, k_ranges, given, bands, num_slices, num_q, num_k),
            {"HAS_TYPES": types is not None, "BLOCK": _BLOCK},
        )  # fmt: skip
    return bands


def build_device_list(bands: Tensor, num_q: int, tile: int, block: int, *, by_key: bool) -> WorkList:
    """As `build_work_list`, of `build_device_bands`'s table. ``by_key``: of its transpose, ``num_q`` being the number of keys.

    ``inner`` and ``edges`` are longer than what tiles refer to.
    """
    num_slices, num_tiles = len(bands), -(-num_q // tile)
    room = min(num_slices * num_tiles, _ROOM_PER_SLICE * num_slices + _ROOM_PER_TILE * num_tiles)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=bands.device)

    # Before the segments of tiles, the edge table holds the band table, for tiles whose segments find no room.
    inner, edges = new(room, 2), new(num_slices + 2 * room, NUM_EDGE_COLUMNS)
    inner_rows, edge_rows = new(num_tiles, 2), new(num_tiles, 2)
    counts = new(_NUM_COUNTS, num_tiles, dtype=torch.int64)
    sizes = (num_slices, num_q, num_tiles)
    constants = {"BY_KEY": by_key, "TILE": tile, "STEP": block, "BLOCK": _BLOCK}
    _launch_count(num_tiles, bands.device, (bands, counts, *sizes), constants)
    ends = counts[:2].cumsum(dim=1)
    arguments = (bands, counts, ends, inner_rows, inner, edge_rows, edges, *sizes, room)
    _launch_fill(num_tiles, bands.device, arguments, constants)
    order = torch.sort(counts[_WORK], descending=True, stable=True).indices.to(torch.int32)
    return WorkList(order, inner_rows, inner, edge_rows, edges)


@triton.jit
def _tightened(q0, q1, k0, k1, lo, hi):
    """See ``mask.bands.tighten``; the last is whether anything is left."""
    q0 = tl.maximum(q0, k0 - hi)
    q1 = tl.minimum(q1, k1 - lo)
    k0 = tl.maximum(k0, q0 + lo)
    k1 = tl.minimum(k1, q1 + hi)
    kept = (q0 < q1) & (k0 < k1) & (lo <= hi)
    return q0, q1, k0, k1, tl.maximum(lo, k0 - q1 + 1), tl.minimum(hi, k1 - 1 - q0), kept


@triton.jit
def _load_range(p, o_slices, m_slices, length):
    begin = tl.load(p + o_slices * 2, mask=m_slices, other=0)
    end = tl.load(p + o_slices * 2 + 1, mask=m_slices, other=0)
    return tl.minimum(tl.maximum(begin, 0), length), tl.minimum(tl.maximum(end, 0), length)


@triton.jit
def store_six(p, b_0, b_1, b_2, b_3, b_4, b_5, m_rows):
    """Six columns of rows that begin at ``p``."""
    tl.store(p, b_0, mask=m_rows)
    tl.store(p + 1, b_1, mask=m_rows)
    tl.store(p + 2, b_2, mask=m_rows)
    tl.store(p + 3, b_3, mask=m_rows)
    tl.store(p + 4, b_4, mask=m_rows)
    tl.store(p + 5, b_5, mask=m_rows)


@triton.jit
def _prepare_kernel(
    p_q_ranges, p_k_ranges, p_types, p_bands, num_slices, num_q, num_k, HAS_TYPES: tl.constexpr, BLOCK: tl.constexpr
):
    o_slices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_slices = o_slices < num_slices
    q0, q1 = _load_range(p_q_ranges, o_slices, m_slices, num_q)
    k0, k1 = _load_range(p_k_ranges, o_slices, m_slices, num_k)
    lo = k0 - q1 + 1
    hi = k1 - 1 - q0
    if HAS_TYPES:  # the bits of a type: 1, an upper bound; 2, a lower one
        types = tl.load(p_types + o_slices, mask=m_slices, other=0)
        hi = tl.where((types & 1) != 0, k1 - q1, hi)
        lo = tl.where((types & 2) != 0, k0 - q0, lo)
    given = (q0 < q1) & (k0 < k1)
    q0, q1, k0, k1, lo, hi, kept = _tightened(q0, q1, k0, k1, lo, hi)
    kept = kept & given
    store_six(
        p_bands + o_slices * 6, tl.where(kept, q0, 0), tl.where(kept, q1, 0), tl.where(kept, k0, 0), tl.where(kept, k1, 0),
        tl.where(kept, lo, 0), tl.where(kept, hi, 0), m_slices,
    )  # fmt: skip


@triton.jit
def _load_bands(p_bands, o_rows, num_rows, BY_KEY: tl.constexpr):
    """Columns of the table, or of its transpose; zeros behind the last row."""
    p = p_bands + o_rows * 6
    m_rows = o_rows < num_rows
    q0 = tl.load(p, mask=m_rows, other=0)
    q1 = tl.load(p + 1, mask=m_rows, other=0)
    k0 = tl.load(p + 2, mask=m_rows, other=0)
    k1 = tl.load(p + 3, mask=m_rows, other=0)
    lo = tl.load(p + 4, mask=m_rows, other=0)
    hi = tl.load(p + 5, mask=m_rows, other=0)
    if BY_KEY:
        return k0, k1, q0, q1, -hi, -lo
    else:
        return q0, q1, k0, k1, lo, hi


@triton.jit
def load_pieces(p_bands, o_rows, num_rows, num_q, tile, BY_KEY: tl.constexpr, TILE: tl.constexpr):
    """Rows of the table cut to a tile, tight; which of them are left; which span all of its queries."""
    q0, q1, k0, k1, lo, hi = _load_bands(p_bands, o_rows, num_rows, BY_KEY)
    start = tile * TILE
    end = tl.minimum(start + TILE, num_q)
    meets = (q0 < end) & (q1 > start)
    q0, q1, k0, k1, lo, hi, kept = _tightened(tl.maximum(q0, start), tl.minimum(q1, end), k0, k1, lo, hi)
    return q0, q1, k0, k1, lo, hi, kept & meets, (q0 == start) & (q1 == end)


@triton.jit
def _segments(p_bands, o_rows, num_rows, num_q, tile, BY_KEY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """What `build_work_list` makes of rows of the table, in one tile: the piece, its inner part, and which segments it has."""
    q0, q1, k0, k1, lo, hi, kept, whole = load_pieces(p_bands, o_rows, num_rows, num_q, tile, BY_KEY, TILE)
    inner_begin = tl.maximum(k0, q1 - 1 + lo)
    length = tl.maximum(tl.minimum(k1, q0 + hi + 1) - inner_begin, 0) // STEP * STEP
    has_inner = kept & whole & (length > 0)
    inner_begin = tl.where(has_inner, inner_begin, k1)
    inner_end = tl.where(has_inner, inner_begin + length, k1)
    has_left = kept & (k0 < inner_begin)
    has_right = kept & (inner_end < k1)
    return q0, q1, k0, k1, lo, hi, inner_begin, inner_end, has_inner, has_left, has_right


@triton.jit
def _count_kernel(
    p_bands, p_counts, num_rows, num_q, num_tiles,
    BY_KEY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    num_inner = 0
    num_left = 0
    num_right = 0
    b_work = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_rows, BLOCK):
        _, _, k0, k1, _, _, inner_begin, inner_end, has_inner, has_left, has_right = _segments(
            p_bands, first + tl.arange(0, BLOCK), num_rows, num_q, tile, BY_KEY, TILE, STEP
        )
        num_inner += tl.sum(has_inner.to(tl.int32), 0)
        num_left += tl.sum(has_left.to(tl.int32), 0)
        num_right += tl.sum(has_right.to(tl.int32), 0)
        b_work += tl.where(has_inner, inner_end - inner_begin, 0)
        b_work += tl.where(has_left, 2 * (inner_begin - k0 + STEP), 0)
        b_work += tl.where(has_right, 2 * (k1 - inner_end + STEP), 0)
    tl.store(p_counts + tile, num_inner)
    tl.store(p_counts + num_tiles + tile, num_left + num_right)
    tl.store(p_counts + num_tiles * 2 + tile, num_left)
    tl.store(p_counts + num_tiles * 3 + tile, tl.sum(b_work, 0))


@triton.jit
def places(first, has):
    """Of those that have one, one after another from ``first``."""
    count = has.to(tl.int32)
    return first + tl.cumsum(count, 0) - count


@triton.jit
def _fill_kernel(
    p_bands, p_counts, p_ends, p_inner_rows, p_inner, p_edge_rows, p_edges, num_rows, num_q, num_tiles, room,
    BY_KEY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # The programs share in copying the band table, whose rows are edges that are not cut by tiles.
    for first in range(tile * BLOCK, num_rows, num_tiles * BLOCK):
        o_rows = first + tl.arange(0, BLOCK)
        q0, q1, k0, k1, lo, hi = _load_bands(p_bands, o_rows, num_rows, BY_KEY)
        store_six(p_edges + o_rows * 6, k0, k1, lo, hi, q0, q1, o_rows < num_rows)
    inner_end = tl.load(p_ends + tile)
    edge_end = tl.load(p_ends + num_tiles + tile)
    if (inner_end <= room) & (edge_end <= 2 * room):
        at_inner = (inner_end - tl.load(p_counts + tile)).to(tl.int32)
        at_left = (num_rows + edge_end - tl.load(p_counts + num_tiles + tile)).to(tl.int32)
        at_right = at_left + tl.load(p_counts + num_tiles * 2 + tile).to(tl.int32)
        tl.store(p_inner_rows + tile * 2, at_inner)
        tl.store(p_inner_rows + tile * 2 + 1, inner_end.to(tl.int32))
        tl.store(p_edge_rows + tile * 2, at_left)
        tl.store(p_edge_rows + tile * 2 + 1, (num_rows + edge_end).to(tl.int32))
        for first in range(0, num_rows, BLOCK):
            q0, q1, k0, k1, lo, hi, begin, end, has_inner, has_left, has_right = _segments(
                p_bands, first + tl.arange(0, BLOCK), num_rows, num_q, tile, BY_KEY, TILE, STEP
            )
            p_segments = p_inner + places(at_inner, has_inner) * 2
            tl.store(p_segments, begin, mask=has_inner)
            tl.store(p_segments + 1, end, mask=has_inner)
            store_six(p_edges + places(at_left, has_left) * 6, k0, begin, lo, hi, q0, q1, has_left)
            store_six(p_edges + places(at_right, has_right) * 6, end, k1, lo, hi, q0, q1, has_right)
            at_inner += tl.sum(has_inner.to(tl.int32), 0)
            at_left += tl.sum(has_left.to(tl.int32), 0)
            at_right += tl.sum(has_right.to(tl.int32), 0)
    else:
        tl.store(p_inner_rows + tile * 2, 0)
        tl.store(p_inner_rows + tile * 2 + 1, 0)
        tl.store(p_edge_rows + tile * 2, 0)
        tl.store(p_edge_rows + tile * 2 + 1, num_rows)


_launch_prepare = Launcher(_prepare_kernel)
_launch_count = Launcher(_count_kernel)
_launch_fill = Launcher(_fill_kernel)
