"""Where the search for a dispatch starts: assignments in which every rank holds runs of the sequence and its share of the area.

Chunks that attend the same keys are neighbours in almost every mask, and what makes a rank receive little is holding *runs* of them. But
runs alone are unbalanced: late chunks of long documents have many times the area of others. So chunks are put in two lists, heavy and
light, and every rank takes the next stretch of each, as long as makes its number of chunks and its area right.

    `two_walks`   heavy: chunks above the mean, in sequence order; light: the others
    `whole_documents`  heavy: documents denser than the mean, the densest first; light: the others, the sparsest first
    `shares`      heavy: all chunks of the longest documents, from both ends inwards, so that a rank gets an early run and a late one
                  of as much area as any other; light: the sparsest documents, whole

Under `two_walks` least is received, but the rank that holds the head of a long document sends it to all who hold a part of it. Under
`shares` that head is spread over all of them.
"""

from __future__ import annotations

import numpy as np

from magi_attention.mask.bands import Ints
from magi_attention.plan.balance import sequential
from magi_attention.plan.chunk_demand import ChunkDemand

# So many chunks a rank tell documents apart.
MANY_CHUNKS = 16
# A document that more ranks than this compute is shared from both ends inwards, so that none of them sends its head to all others.
_MOST_READERS = 4


def starts(demand: ChunkDemand, num_ranks: int, area_limit: int) -> list[Ints]:
    """``[num_chunks]`` owners each, equally many chunks a rank; areas about even, except where all chunks weigh the same."""
    areas = demand.areas
    found = [two_walks(areas, num_ranks, by_level=level) for level in (False, True)]
    found += [shares(demand, num_ranks, scale) for scale in (0.5, 1.0)]
    if len(areas) >= MANY_CHUNKS * num_ranks:
        found.append(whole_documents(demand, num_ranks))
    in_order = sequential(areas, num_ranks, -(-len(areas) // num_ranks))
    if np.bincount(in_order, weights=areas, minlength=num_ranks).max(initial=0) <= area_limit:
        found.append(in_order)
    return found


def two_walks(areas: Ints, num_ranks: int, *, by_level: bool) -> Ints:
    """Every rank takes a stretch of the chunks heavier than the mean and one of the others.

    Both lists are walked in sequence order or, ``by_level``, in order of how heavy the rising stretch (a document, say) is that a chunk
    belongs to: the heaviest stretches meet the lightest.
    """
    heavy = areas * len(areas) > areas.sum()
    level = np.zeros(len(areas), np.int64)
    if by_level and len(areas):
        stretch = np.cumsum(np.diff(areas, prepend=0) < 0)
        level = np.maximum.reduceat(areas, np.flatnonzero(np.diff(stretch, prepend=-1)))[stretch]
    falling, rising = np.argsort(-level, kind="stable"), np.argsort(level, kind="stable")
    owner = np.empty(len(areas), np.int64)
    _walk(owner, areas, falling[heavy[falling]], rising[~heavy[rising]], num_ranks, all_ranks=True)
    return owner


def shares(demand: ChunkDemand, num_ranks: int, scale: float) -> Ints:
    """The longest documents are shared by ranks that each get as much of their beginnings as of their ends; `two_walks` deals the rest.

    Shared are documents whose head, were it held by one rank, would be sent more than ``scale`` times as often as the longest
    document has columns.
    """
    areas, num_chunks = demand.areas, len(demand.areas)
    document = documents_of(demand)
    length, area = np.bincount(document), np.bincount(document, weights=areas)
    # Of a document above the mean, as many fewer chunks fill a rank: so many more ranks is its head sent to.
    excess = np.maximum(area * num_chunks / np.maximum(length * areas.sum(), 1), 1)
    shared = (length * excess > scale * length.max(initial=0))[document]

    first = np.cumsum(length) - length
    from_front = np.arange(num_chunks) - first[document]
    inwards = _inwards(from_front, length[document])
    density = (area / np.maximum(length, 1))[document]
    dense_first = np.lexsort((inwards, document, -density))
    sparse_first = np.lexsort((np.arange(num_chunks), document, density))
    owner = np.full(num_chunks, -1)
    heavy, light = dense_first[shared[dense_first]], sparse_first[~shared[sparse_first]]
    num_filled = _walk(owner, areas, heavy, light, num_ranks, all_ranks=False)
    rest = np.flatnonzero(owner < 0)
    if len(rest):
        owner[rest] = num_filled + two_walks(areas[rest], num_ranks - num_filled, by_level=False)
    return owner


def whole_documents(demand: ChunkDemand, num_ranks: int) -> Ints:
    """Every rank takes a stretch of the dense documents and one of the sparse ones, the densest beside the sparsest.

    Documents stay in one piece, except where a rank's share ends, and those that take many ranks.
    """
    areas, document = demand.areas, documents_of(demand)
    length, area = np.bincount(document), np.zeros(int(document[-1]) + 1, np.int64)
    np.add.at(area, document, areas)
    readers = area * num_ranks > _MOST_READERS * int(areas.sum())
    from_front = np.arange(len(areas)) - (np.cumsum(length) - length)[document]
    place = np.where(readers[document], _inwards(from_front, length[document]), from_front)
    density, is_dense = (area / length)[document], (area * len(areas) >= length * int(areas.sum()))[document]
    dense_first = np.lexsort((place, document, -density))
    sparse_first = np.lexsort((np.arange(len(areas)), document, density))
    owner = np.empty(len(areas), np.int64)
    heavy, light = dense_first[is_dense[dense_first]], sparse_first[~is_dense[sparse_first]]
    _walk(owner, areas, heavy, light, num_ranks, all_ranks=True)
    return owner


def _inwards(from_front: Ints, length: Ints) -> Ints:
    """The order of chunks from both ends of a document inwards: the first, the last, the second, the last but one, ..."""
    return np.minimum(2 * from_front, 2 * (length - 1 - from_front) + 1)


def documents_of(demand: ChunkDemand) -> Ints:
    """``[num_chunks]`` number of the document of each chunk: neighbours whose last interval of keys begins at the same column are one."""
    begins = np.full(len(demand.areas), -1)
    begins[demand.chunk] = demand.first  # of several intervals, the last is kept: they are ordered
    result: Ints = np.cumsum(np.diff(begins, prepend=-2) != 0) - 1
    return result


def _walk(owner: Ints, areas: Ints, heavy: Ints, light: Ints, num_ranks: int, *, all_ranks: bool) -> int:
    """Every rank takes what makes its area nearest to an even share of what is left, until the heavy chunks are gone or, if asked, all.

    Writes ``owner``; returns how many ranks are filled.
    """
    heavy_sum, light_sum = (np.append(0, np.cumsum(areas[chunks])) for chunks in (heavy, light))
    at_heavy = at_light = 0
    for rank in range(num_ranks):
        if at_heavy == len(heavy) and not all_ranks:
            return rank
        left = len(heavy) + len(light) - at_heavy - at_light
        count = -(-left // (num_ranks - rank))
        num_heavy = np.arange(max(0, count - (len(light) - at_light)), min(count, len(heavy) - at_heavy) + 1)
        area = heavy_sum[at_heavy + num_heavy] + light_sum[at_light + count - num_heavy]
        area -= heavy_sum[at_heavy] + light_sum[at_light]
        remaining = heavy_sum[-1] - heavy_sum[at_heavy] + light_sum[-1] - light_sum[at_light]
        take = int(num_heavy[np.argmin(np.abs(area * (num_ranks - rank) - remaining))])
        owner[heavy[at_heavy : at_heavy + take]] = rank
        owner[light[at_light : at_light + count - take]] = rank
        at_heavy, at_light = at_heavy + take, at_light + count - take
    return num_ranks
