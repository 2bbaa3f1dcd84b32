"""From lengths, flags and a dispatch config to the layouts of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from magi_attention.config import AffinityDispatchAlg, DispatchConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import Ints
from magi_attention.mask.inputs import MOST_TOKENS
from magi_attention.plan.balance import sequential
from magi_attention.plan.chunk_size import chunk_sizes, finer_size
from magi_attention.plan.dispatch import DispatchProblem, candidates, chunk_areas, place_keys
from magi_attention.plan.layout import ShardLayout, default_chunk_size, padded_length


@dataclass(frozen=True, eq=False)
class ChunkCut:
    """A sequence cut in chunks that no rank owns yet: ``edges`` ``[num_chunks + 1]``, at most ``max_chunks`` a rank."""

    total_seqlen: int
    chunk_size: int
    num_ranks: int
    edges: Ints

    @property
    def max_chunks(self) -> int:
        return -(-(len(self.edges) - 1) // self.num_ranks)

    def layout(self, owner: Ints) -> ShardLayout:
        return ShardLayout(self.total_seqlen, int(self.edges[-1]), self.chunk_size, self.num_ranks, owner)


def cut_in_chunks(
    total_seqlen: int,
    num_ranks: int,
    config: DispatchConfig,
    min_chunks_per_rank: int,
    pad_size: int | None,
    chunk_size: int | None = None,
) -> ChunkCut:
    """Padding and chunk borders of one side; ``chunk_size`` None is the config's or, where it has none, the default.

    Raises:
        ValueError: ``pad_size`` is neither None nor 0 and does not make whole chunks, equally many on every rank; or with the padding
            the sequence is longer than a mask may be.
    """
    chunk_size = chunk_size or config.chunk_size or default_chunk_size(total_seqlen, num_ranks, min_chunks_per_rank)
    needed = 0 if config.uneven_shard else padded_length(total_seqlen, num_ranks, chunk_size) - total_seqlen
    pad_size = pad_size or needed
    block = num_ranks * chunk_size
    if pad_size < 0 or (pad_size if config.uneven_shard else (total_seqlen + pad_size) % block):
        rule = (
            "uneven_shard pads nothing"
            if config.uneven_shard
            else f"{total_seqlen} tokens and their padding must be a multiple of chunk_size {chunk_size} x {num_ranks} ranks"
        )
        raise ValueError(f"pad_size must be {needed} here ({rule}), got {pad_size}; leave it out to have it computed")
    padded = total_seqlen + pad_size
    if max(padded, chunk_size) > MOST_TOKENS:
        raise ValueError(
            f"a sequence and its padding must be at most {MOST_TOKENS:,} tokens, got {padded:,} ({total_seqlen:,} tokens and "
            f"{pad_size:,} of padding, in chunks of {chunk_size:,} on {num_ranks} ranks); use a smaller chunk_size"
        )
    edges = np.minimum(np.arange(-(-padded // chunk_size) + 1) * chunk_size, padded)
    return ChunkCut(total_seqlen, chunk_size, num_ranks, edges)


def make_layouts(
    mask: AttnMask,
    num_ranks: int,
    config: DispatchConfig,
    *,
    is_same_source: bool,
    is_q_permutable: bool,
    is_k_permutable: bool,
    pad_size: int | None,
    min_chunks_per_rank: int,
    q_layout: ShardLayout | None,
    k_layout: ShardLayout | None,
) -> Iterator[tuple[ShardLayout, ShardLayout]]:
    """Layouts of q and k to choose from, made as they are asked for (see `dispatch.candidates`); arguments as in `build_plan`."""
    if is_same_source:
        if mask.num_q != mask.num_k or is_q_permutable != is_k_permutable:
            raise ValueError(
                "with is_same_source=True queries and keys are the same rows, so their totals and flags must be equal, got "
                f"total_seqlen_q={mask.num_q}, total_seqlen_k={mask.num_k}, is_q_permutable={is_q_permutable}, "
                f"is_k_permutable={is_k_permutable}; pass is_same_source=False for cross-attention"
            )
        q_layout = q_layout if q_layout is not None else k_layout

    q_layouts: Iterable[ShardLayout] = [q_layout] if q_layout is not None else []
    if q_layout is None:
        if is_q_permutable:
            k_edges = (
                None
                if is_same_source
                else cut_in_chunks(mask.num_k, num_ranks, config, min_chunks_per_rank, None).edges
            )
            cuts = cuts_to_try(
                mask.num_q, num_ranks, config, min_chunks_per_rank, pad_size, partial(chunk_areas, mask.bands)
            )
            q_layouts = _dispatched(mask.bands, cuts, k_edges, config)
        else:
            cut = cut_in_chunks(mask.num_q, num_ranks, config, min_chunks_per_rank, pad_size)
            q_layouts = [cut.layout(sequential(np.diff(cut.edges), num_ranks, cut.max_chunks))]
    for chosen in q_layouts:
        other = chosen if is_same_source else k_layout
        if other is None:
            cut = cut_in_chunks(mask.num_k, num_ranks, config, min_chunks_per_rank, None)
            other = cut.layout(
                place_keys(mask.bands, chosen, cut.edges, cut.max_chunks)
                if is_k_permutable
                else sequential(np.zeros(len(cut.edges) - 1, np.int64), num_ranks, cut.max_chunks)
            )
        _check_fit(mask, num_ranks, chosen, other)
        yield chosen, other


def cuts_to_try(
    total_seqlen: int,
    num_ranks: int,
    config: DispatchConfig,
    min_chunks_per_rank: int,
    pad_size: int | None,
    areas_of: Callable[[Ints], Ints],
) -> Iterator[ChunkCut]:
    """The cut that is asked for; without a chunk size the coarsest, then the one that areas ask for (see `plan.chunk_size`) and finer.

    ``areas_of``: the area of every chunk, from the chunks' edges.
    """

    def cut(size: int | None) -> ChunkCut:
        return cut_in_chunks(total_seqlen, num_ranks, config, min_chunks_per_rank, pad_size, size)

    if config.chunk_size is not None or not isinstance(config.alg, AffinityDispatchAlg) or num_ranks == 1:
        yield cut(None)
        return
    sizes = chunk_sizes(total_seqlen, num_ranks, min_chunks_per_rank)
    if pad_size:  # only what it fits; where nothing does, the default size says so
        padded = total_seqlen + pad_size
        sizes = iter([size for size in sizes if padded % (num_ranks * size) == 0])
    coarsest = next(sizes, None)
    yield cut(coarsest)
    finer = finer_size(sizes, lambda size: areas_of(cut(size).edges), num_ranks)
    if finer is not None:
        yield cut(finer)
        yield from map(cut, sizes)


def _dispatched(
    bands: Ints, cuts: Iterator[ChunkCut], k_edges: Ints | None, config: DispatchConfig
) -> Iterator[ShardLayout]:
    """Layouts to choose from: those of the first cut that can be balanced with something left to choose, else of the last.

    ``k_edges``: of the keys, None where they are the queries' rows.
    """
    following: ChunkCut | None = next(cuts)
    while following is not None:
        cut, following = following, None
        edges = cut.edges
        problem = DispatchProblem(
            bands,
            edges,
            edges if k_edges is None else k_edges,
            k_edges is None,
            chunk_areas(bands, edges),
            cut.num_ranks,
        )
        found = candidates(problem, config)
        if not problem.can_be_even and (following := next(cuts, None)) is not None:
            continue
        first = next(found)
        if first is problem.heap and problem.areas.any() and (following := next(cuts, None)) is not None:
            continue
        yield cut.layout(first)
        yield from map(cut.layout, found)


def _check_fit(mask: AttnMask, num_ranks: int, q_layout: ShardLayout, k_layout: ShardLayout) -> None:
    for side, layout, length in (("q", q_layout, mask.num_q), ("k", k_layout, mask.num_k)):
        if layout.total_seqlen != length or layout.num_ranks != num_ranks:
            raise ValueError(
                f"the {side} side has {length} tokens on {num_ranks} ranks, but the layout given for it is of "
                f"{layout.total_seqlen} tokens on {layout.num_ranks}; give a key of the same length and group"
            )
