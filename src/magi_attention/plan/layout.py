"""Which rank holds which rows of a sequence.

tokens   0    4    8    12   16          chunk_size 4, owner [0, 1, 1, 0]
         |  0 |  1 |  1 |  0 |
rank 0   [0..4) -> rows 0..4, [12..16) -> rows 4..8
rank 1   [4..12) -> rows 0..8             neighbouring chunks of one rank are one run
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.mask.bands import Ints, expand


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """A sequence cut in chunks, each owned by one rank; a rank's rows are its chunks in ascending order.

    ``total_seqlen``: tokens. ``padded_seqlen``: tokens and the padding behind them. ``chunk_size``: tokens of every chunk (the last may be
    shorter). ``owner``: ``[num_chunks]`` int64 rank of each chunk.
    """

    total_seqlen: int
    padded_seqlen: int
    chunk_size: int
    num_ranks: int
    owner: Ints

    @property
    def pad_size(self) -> int:
        return self.padded_seqlen - self.total_seqlen

    @property
    def num_chunks(self) -> int:
        return len(self.owner)

    @cached_property
    def chunk_edges(self) -> Ints:
        """``[num_chunks + 1]``: where chunks begin, and the end."""
        return np.minimum(np.arange(self.num_chunks + 1) * self.chunk_size, self.padded_seqlen)

    @cached_property
    def runs(self) -> Ints:
        """``[m, 4]`` rows ``(start, end, rank, local_start)``, ascending and covering the padded sequence."""
        if not self.num_chunks:
            return np.empty((0, 4), np.int64)
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        last = np.append(first[1:], self.num_chunks)
        start, end, rank = self.chunk_edges[first], self.chunk_edges[last], self.owner[first]
        order = np.argsort(rank, kind="stable")
        before = np.cumsum((end - start)[order]) - (end - start)[order]
        _, group_first, group = np.unique(rank[order], return_index=True, return_inverse=True)
        local_start = np.empty_like(start)
        local_start[order] = before - before[group_first][group]
        return np.stack([start, end, rank, local_start], axis=1)

    @cached_property
    def num_rows(self) -> Ints:
        """``[num_ranks]``: rows that each rank holds, padding included."""
        counts = np.zeros(self.num_ranks, np.int64)
        np.add.at(counts, self.runs[:, 2], self.runs[:, 1] - self.runs[:, 0])
        return counts

    def rank_runs(self, rank: int) -> Ints:
        """The rows of `runs` that belong to ``rank``."""
        return self.runs[self.runs[:, 2] == rank]

    def rank_chunks(self, rank: int) -> Ints:
        """Indices of the chunks of ``rank``, ascending."""
        return np.flatnonzero(self.owner == rank)

    def positions(self, rank: int) -> Ints:
        """``[num_rows[rank]]``: the global position of each local row; padding rows lie at or behind ``total_seqlen``."""
        runs = self.rank_runs(rank)
        return expand(runs[:, 0], runs[:, 1] - runs[:, 0])[1]

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """``(rank, local_row)`` of global positions inside the padded sequence."""
        run = np.searchsorted(self.runs[:, 1], positions, side="right")
        return self.runs[run, 2], self.runs[run, 3] + positions - self.runs[run, 0]


def padded_length(total_seqlen: int, num_ranks: int, chunk_size: int) -> int:
    """The length after padding to equal whole chunks on every rank."""
    block = num_ranks * chunk_size
    return -(-total_seqlen // block) * block


def default_chunk_size(total_seqlen: int, num_ranks: int, min_chunks_per_rank: int) -> int:
    """Tokens a chunk so that every rank has about ``min_chunks_per_rank`` of them."""
    return max(1, -(-total_seqlen // (min_chunks_per_rank * num_ranks)))
