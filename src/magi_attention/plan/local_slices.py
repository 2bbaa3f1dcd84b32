"""One rank's slices, in the coordinates of the rows that it holds and of the buffer that it receives.

Local k rows and receive buffers have the same form: *segments*, each from one source, ascending in global position inside a source.
What a piece of the mask attends in full is then one rectangle per source, however many runs of the sequence that source
contributes; only its two slanted ends are cut run by run.

    global keys     0....1....2....3....4....5            a causal piece whose queries lie in run 4
    attended        ##### ##### ##### ##### #\\            full up to the diagonal
    buffer          |source A: runs 0 2 |source B: runs 1 3|   ->  one rectangle of A, one of B
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, Ints, shift, split_k, split_q, tighten
from magi_attention.plan.layout import ShardLayout

Flags = NDArray[np.bool_]

# Columns of a segment table: global keys [START, STOP) lie at buffer rows from ROW, and came from source SOURCE (0, 1, ...).
START, STOP, ROW, SOURCE = range(4)


def local_pieces(bands: Ints, q_layout: ShardLayout, rank: int) -> tuple[Ints, Ints]:
    """The rows of a mask that ``rank``'s queries hold, in global coordinates, and ``[p]``: what to add to make q local."""
    runs = q_layout.rank_runs(rank)
    pieces, _, run = split_q(bands, runs[:, 0], runs[:, 1])
    return pieces, (runs[:, 3] - runs[:, 0])[run]


def local_pieces_by_chunk(bands: Ints, q_layout: ShardLayout, rank: int) -> tuple[Ints, Ints, Ints]:
    """As `local_pieces`, cut at chunks, and ``[p]``: the chunk of each."""
    chunks = q_layout.rank_chunks(rank)
    starts = q_layout.chunk_edges[chunks]
    pieces, _, at = split_q(bands, starts, q_layout.chunk_edges[chunks + 1])
    return pieces, (q_layout.locate(starts)[1] - starts)[at], chunks[at]


def segments_of_layout(layout: ShardLayout, rank: int) -> Ints:
    """The rows that ``rank`` holds itself, as segments of one source."""
    start, end, _, local_start = layout.rank_runs(rank).T
    return np.stack([start, end, local_start, np.zeros_like(start)], axis=1)


def segments_of_buffer(begin: Ints, end: Ints, way: Ints) -> Ints:
    """Segments laid end to end in a receive buffer; rows that came the same ``way`` lie together and are one source."""
    length = end - begin
    source = np.cumsum(np.diff(way, prepend=-1) != 0) - 1
    return np.stack([begin, end, np.cumsum(length) - length, source], axis=1)


def to_buffer(pieces: Ints, q_by: Ints, segments: Ints, blocked: Flags | None = None) -> Ints:
    """Express pieces in local q coordinates and buffer rows, dropping what the buffer does not hold.

    ``pieces``: ``[p, 6]`` global rows. ``q_by``: ``[p]`` shift to local q. ``segments``: ``[s, 4]``, ascending by source, then
    position, their
    buffer rows end to end. ``blocked``: ``[p, num_sources]``, pieces that leave a source's rows alone. Returns a tight ``[n, 6]`` table.
    """
    if not len(pieces) or not len(segments):
        return np.empty((0, 6), np.int64)
    # Keys that all of a piece's queries attend.
    inner_begin = np.maximum(pieces[:, K0], pieces[:, Q1] - 1 + pieces[:, LO])
    inner_end = np.minimum(pieces[:, K1], pieces[:, Q0] + pieces[:, HI] + 1)
    has_inner = inner_begin < inner_end
    inner_begin = np.where(has_inner, inner_begin, pieces[:, K1])
    inner_end = np.where(has_inner, inner_end, pieces[:, K1])

    rows = _full_rows(inner_begin, inner_end, segments)  # [p, num_sources, 2]
    local = shift(pieces, q_by, 0)
    num_pieces, num_sources = rows.shape[:2]
    inner = np.empty((num_pieces, num_sources, 6), np.int64)
    inner[..., :K0] = local[:, None, :K0]
    inner[..., K0:LO] = rows
    inner[..., LO] = inner[..., K0] - inner[..., Q1] + 1
    inner[..., HI] = inner[..., K1] - 1 - inner[..., Q0]

    if blocked is not None:
        inner[blocked, K1] = inner[blocked, K0]
    left = pieces.copy()
    left[:, K1] = np.minimum(left[:, K1], inner_begin)
    right = pieces.copy()
    right[:, K0] = np.maximum(right[:, K0], inner_end)
    edges = [
        _join_edges(inner, left, q_by, segments, blocked, joins_after=False),
        _join_edges(inner, right, q_by, segments, blocked, joins_after=True),
    ]
    return tighten(np.concatenate([inner.reshape(-1, 6), *edges]))[0]


def _full_rows(begin: Ints, end: Ints, segments: Ints) -> Ints:
    """``[p, num_sources, 2]``: the buffer rows of each source that lie in the global key interval ``[begin, end)`` of each piece."""
    num_sources = int(segments[-1, SOURCE]) + 1
    stride = max(int(segments[:, STOP].max()), int(end.max())) + 1
    keyed_stop = segments[:, SOURCE] * stride + segments[:, STOP]

    def row_of(
        position: Ints,
    ) -> Ints:  # [p] -> [p, num_sources]: the first buffer row of the source at or behind position
        wanted = position[:, None] + np.arange(num_sources) * stride
        at = np.minimum(np.searchsorted(keyed_stop, wanted, side="right"), len(segments) - 1)
        segment = segments[at]
        inside = np.clip(position[:, None] - segment[..., START], 0, segment[..., STOP] - segment[..., START])
        behind = segment[..., SOURCE] > np.arange(
            num_sources
        )  # behind all of this source's rows: where the next one begins
        rows: Ints = segment[..., ROW] + np.where(behind, 0, inside)
        return rows

    return np.stack([row_of(begin), row_of(end)], axis=-1)


def _join_edges(
    inner: Ints, edges: Ints, q_by: Ints, segments: Ints, blocked: Flags | None, *, joins_after: bool
) -> Ints:
    """Cut slanted ends by segment and give each part to the rectangle of its source that it touches, in place.

    ``inner``: ``[p, num_sources, 6]`` buffer rectangles, empty where K0 == K1. Returns the parts that touch none.
    """
    tight, kept = tighten(edges)
    origin = np.flatnonzero(kept)
    by_start = np.argsort(segments[:, START], kind="stable")
    ordered = segments[by_start]
    parts, row, at = split_k(tight, ordered[:, START], ordered[:, STOP])
    piece, source = origin[row], ordered[at, SOURCE]
    if blocked is not None:
        free = ~blocked[piece, source]
        parts, piece, source, at = parts[free], piece[free], source[free], at[free]
    parts = shift(parts, q_by[piece], ordered[at, ROW] - ordered[at, START])
    target = inner[piece, source]
    nonempty = target[:, K0] < target[:, K1]
    if joins_after:
        # Exact only where the slant goes on from the rectangle's last key: its first query ends there.
        joined = nonempty & (parts[:, K0] == target[:, K1]) & (parts[:, HI] == target[:, K1] - 1 - target[:, Q0])
        inner[piece[joined], source[joined], K1] = parts[joined, K1]
        inner[piece[joined], source[joined], HI] = parts[joined, HI]
    else:
        joined = nonempty & (parts[:, K1] == target[:, K0]) & (parts[:, LO] == target[:, K0] - target[:, Q1] + 1)
        inner[piece[joined], source[joined], K0] = parts[joined, K0]
        inner[piece[joined], source[joined], LO] = parts[joined, LO]
    return parts[~joined]
