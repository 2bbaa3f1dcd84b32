"""How many tokens a chunk has where nobody says: as many as today's coarsest cut gives, or fewer where no balance can be had with those.

A chunk late in a long document holds many times the area of one in a short document. While the largest chunk outweighs a good part of what
a rank should compute, no assignment is balanced, and nothing is left to choose what would save traffic:

    area of chunks    ▂▅█ ▁▂ ▁ ▂▄ ▁▁     a rank's mean: ▆   -> the rank that holds █ is over it, whatever else it holds
    cut in halves     ▁▂▃▄▅▆ ▁▁▂ ...                        -> two ranks share it

Areas are looked at before anything is dispatched, so that the choice costs no second plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from magi_attention.mask.bands import Ints
from magi_attention.plan.layout import default_chunk_size

# Chunks are not cut finer than this many tokens: a tile of queries in the kernels.
FINEST_CHUNK = 128
# Chunks are cut until the largest has at most one part of this many of a rank's mean area.
PARTS_OF_MEAN = 2


def chunk_sizes(total_seqlen: int, num_ranks: int, min_chunks_per_rank: int) -> Iterator[int]:
    """The default size, then what makes two, four, ... times as many chunks, down to `FINEST_CHUNK`."""
    yield default_chunk_size(total_seqlen, num_ranks, min_chunks_per_rank)
    factor = 2
    while (size := default_chunk_size(total_seqlen, num_ranks, min_chunks_per_rank * factor)) >= FINEST_CHUNK:
        yield size
        factor *= 2


def fine_enough(areas: Ints, num_ranks: int) -> bool:
    """Whether the largest chunk is a small enough part of a rank's mean area."""
    return int(areas.max(initial=0)) * num_ranks * PARTS_OF_MEAN <= int(areas.sum())


def finer_size(sizes: Iterator[int], areas_of: Callable[[int], Ints], num_ranks: int) -> int | None:
    """The first of ``sizes``, falling, whose chunks are `fine_enough`; else the last; None where there are none."""
    size = None
    for size in sizes:
        if fine_enough(areas_of(size), num_ranks):
            return size
    return size
