"""The masks that people name, as band tables: one row where one does, and no loop over tokens, blocks or documents.

Every function here is also a static method of `AttnMask`. Drawings: queries downwards, keys to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask.bands import CAUSAL, FULL, Ints, bands_from_slices, expand, tighten
from magi_attention.mask.inputs import (
    as_cu_seqlens,
    as_ints,
    as_lengths,
    as_pairs,
    check_length,
    check_size,
    ranges_of,
)
from magi_attention.mask.window import check_window, window_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask


def make_mask(bands: Ints, num_q: int, num_k: int) -> AttnMask:
    """The mask of a table that need not be tight."""
    from magi_attention.mask.attn_mask import AttnMask  # which offers what is built on this as its own

    return AttnMask(tighten(np.asarray(bands, np.int64).reshape(-1, 6))[0], num_q, num_k)


def full(num_q: int, num_k: int | None = None) -> AttnMask:
    """Every query attends every key. ``num_k`` left out is ``num_q``. One row."""
    num_q, num_k = _lengths(num_q, num_k)
    return _of_ranges(np.array([[0, num_q]]), np.array([[0, num_k]]), FULL, num_q, num_k)


def causal(num_q: int, num_k: int | None = None) -> AttnMask:
    """Every query attends the keys up to its own, the last query all of them (bottom-right aligned). One row.

    #...
    ##..
    ###.
    ####
    """
    num_q, num_k = _lengths(num_q, num_k)
    return _of_ranges(np.array([[0, num_q]]), np.array([[0, num_k]]), CAUSAL, num_q, num_k)


def varlen(
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = None,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    num_global: int = 0,
) -> AttnMask:
    """Packed documents that attend only themselves. One row a document, two with global keys.

        #....
        ##...
        ..#..
        ..##.
        ..###

    Args:
        cu_seqlens_q: where documents begin, and the end: ``num_documents + 1`` ints from 0.
        cu_seqlens_k: the same of the keys; left out, the queries'.
        causal: bottom-right aligned in every document.
        window_size: ``(left, right)`` as flash-attention's, bottom-right aligned in every document; -1 is unbounded.
        num_global: the first keys of a document that all its queries attend, as far as ``right`` allows.

    Raises:
        ValueError: edges that do not begin at 0 or that descend, different numbers of documents, a window beside ``causal``.
    """
    edges_q = as_cu_seqlens(cu_seqlens_q, "cu_seqlens_q")
    edges_k = edges_q if cu_seqlens_k is None else as_cu_seqlens(cu_seqlens_k, "cu_seqlens_k")
    if len(edges_q) != len(edges_k):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must tell of equally many documents, got {len(edges_q) - 1} and {len(edges_k) - 1}"
        )
    window = check_window(window_size)
    if causal and window != (-1, -1):
        raise ValueError(
            f"causal=True is the window (-1, 0): give one of the two, got window_size={window}. For a causal window of w keys, "
            "give window_size=(w - 1, 0)"
        )
    num_global = check_size(num_global, "num_global")
    num_q, num_k = int(edges_q[-1]), int(edges_k[-1])
    if window == (-1, -1):
        return _of_ranges(ranges_of(edges_q), ranges_of(edges_k), CAUSAL if causal else FULL, num_q, num_k)
    return make_mask(window_bands(ranges_of(edges_q), ranges_of(edges_k), window, num_global), num_q, num_k)


def sliding_window(
    num_q: int,
    window_size: Sequence[int],
    num_k: int | None = None,
    *,
    num_global: int = 0,
    global_queries: bool = False,
) -> AttnMask:
    """Every query attends the keys around its own. One row, two with global keys, three with global queries.

        ##....        window (1, 1)
        ###...
        .###..
        ..###.
        ...###
        ....##

    Args:
        window_size: ``(left, right)``: how many keys on either side of its own, bottom-right aligned; -1 is unbounded.
        num_global: the first keys that all queries attend, as far as ``right`` allows.
        global_queries: the first ``num_global`` queries attend all keys, and all queries the first ``num_global`` keys whatever
            ``right`` is.
    """
    num_q, num_k = _lengths(num_q, num_k)
    num_global = check_size(num_global, "num_global")
    window = check_window(window_size)
    q_range, k_range = np.array([[0, num_q]]), np.array([[0, num_k]])
    if not global_queries:
        return make_mask(window_bands(q_range, k_range, window, num_global), num_q, num_k)
    top, left = min(num_global, num_q), min(num_global, num_k)
    inner = window_bands(q_range, k_range, window)
    inner[:, 0], inner[:, 2] = np.maximum(inner[:, 0], top), np.maximum(inner[:, 2], left)
    rectangles = np.array([[0, top, 0, num_k], [top, num_q, 0, left]])
    outer = bands_from_slices(rectangles[:, :2], rectangles[:, 2:], np.zeros(2, np.int64))
    return make_mask(np.concatenate([outer, inner]), num_q, num_k)


def block_causal(num_tokens: int, block_size: int) -> AttnMask:
    """Every query attends all keys up to the end of its own block. One row a block; the last may be shorter.

    ##....
    ##....
    ####..
    ####..
    ######
    ######
    """
    return varlen_block_causal([0, check_length(num_tokens, "num_tokens")], block_size)


def varlen_block_causal(cu_seqlens: Any, block_size: int, *, num_blocks: int | None = None) -> AttnMask:
    """Block-causal inside packed documents: chunks of frames in videos. One row a block.

        ##......     documents of 4 and 4, blocks of 2
        ##......
        ####....
        ####....
        ....##..
        ....##..
        ....####
        ....####

    Args:
        cu_seqlens: where documents begin, and the end. Blocks are counted from each document's beginning.
        num_blocks: how many blocks a query attends, its own among them; left out, all up to its own.
    """
    edges = as_cu_seqlens(cu_seqlens, "cu_seqlens")
    block_size = check_size(block_size, "block_size", 1)
    document, block = _blocks_of(edges, block_size)
    q0 = edges[document] + block * block_size
    q1 = np.minimum(q0 + block_size, edges[document + 1])
    k0 = edges[document]
    if num_blocks is not None:
        k0 = np.maximum(k0, q0 - (check_size(num_blocks, "num_blocks", 1) - 1) * block_size)
    return _rectangles(q0, q1, k0, q1, int(edges[-1]))


def chunked_causal(num_tokens: int, chunk_size: int, cu_seqlens: Any = None) -> AttnMask:
    """Causal inside chunks and blind outside: local attention. One row a chunk.

        #.....       chunks of 3
        ##....
        ###...
        ...#..
        ...##.

    Args:
        cu_seqlens: documents, from whose beginnings chunks are counted; left out, one document of all tokens.
    """
    num_tokens, chunk_size = check_length(num_tokens, "num_tokens"), check_size(chunk_size, "chunk_size", 1)
    edges = as_cu_seqlens([0, num_tokens] if cu_seqlens is None else cu_seqlens, "cu_seqlens")
    if edges[-1] != num_tokens:
        raise ValueError(f"cu_seqlens must end at num_tokens, {num_tokens}, got {int(edges[-1])}")
    document, chunk = _blocks_of(edges, chunk_size)
    starts = edges[document] + chunk * chunk_size
    ranges = np.stack([starts, np.minimum(starts + chunk_size, edges[document + 1])], axis=1)
    return _of_ranges(ranges, ranges, CAUSAL, num_tokens, num_tokens)


def dilated_blocks(
    num_tokens: int, block_size: int, dilation: int, *, num_blocks: int | None = None, causal: bool = True
) -> AttnMask:
    """Blocks that attend themselves and every ``dilation``-th block from there. One row a pair; blocks of one token: one a diagonal.

        #....        blocks of 1, dilation 2
        .#...
        #.#..
        .#.#.
        #.#.#

    Args:
        num_blocks: how many blocks a query attends on each side, its own among them; left out, as many as there are.
        causal: only earlier blocks, and a query's own block up to itself; else both sides alike.
    """
    num_tokens, block_size = check_length(num_tokens, "num_tokens"), check_size(block_size, "block_size", 1)
    dilation = check_size(dilation, "dilation", 1)
    count = -(-num_tokens // block_size)
    most = -(-count // dilation) if num_blocks is None else check_size(num_blocks, "num_blocks", 1)
    steps = np.arange(min(most, -(-count // dilation))) * dilation  # block distances backwards
    steps = steps if causal else np.union1d(-steps, steps)
    if block_size == 1:
        shape = np.array([0, num_tokens, 0, num_tokens, 0, 0])
        return make_mask(
            shape + np.stack([np.zeros_like(steps)] * 4 + [-steps, -steps], axis=1), num_tokens, num_tokens
        )
    q_block = np.repeat(np.arange(count), len(steps))
    k_block = q_block - np.tile(steps, count)
    inside = (k_block >= 0) & (k_block < count)
    q_block, k_block = q_block[inside], k_block[inside]
    q_ranges, k_ranges = (
        np.stack([at * block_size, np.minimum((at + 1) * block_size, num_tokens)], axis=1) for at in (q_block, k_block)
    )
    types = np.where(causal & (q_block == k_block), CAUSAL, FULL)
    return make_mask(bands_from_slices(q_ranges, k_ranges, types), num_tokens, num_tokens)


def strided_blocks(num_tokens: int, block_size: int, stride: int) -> AttnMask:
    """Causal inside blocks, and every ``stride``-th block attended by all later queries. One row a block, one more a strided block.

    #.....       blocks of 2, stride 2: the second block is a summary
    ##....
    ..#...
    ..##..
    ..###.
    ..####
    """
    num_tokens, block_size = check_length(num_tokens, "num_tokens"), check_size(block_size, "block_size", 1)
    stride = check_size(stride, "stride", 1)
    starts = np.arange(0, num_tokens, block_size)
    ranges = np.stack([starts, np.minimum(starts + block_size, num_tokens)], axis=1)
    own = bands_from_slices(ranges, ranges, np.full(len(ranges), CAUSAL))
    columns = ranges[stride - 1 :: stride]
    below = np.stack([columns[:, 1], np.full(len(columns), num_tokens)], axis=1)
    summaries = bands_from_slices(below, columns, np.full(len(columns), FULL))
    return make_mask(np.concatenate([own, summaries]), num_tokens, num_tokens)


def prefix_lm(num_tokens: int, prefix_length: int) -> AttnMask:
    """A prefix that sees all of itself, and causal text behind it. Two rows.

    ##..
    ##..
    ###.
    ####
    """
    return varlen_prefix_lm([0, check_length(num_tokens, "num_tokens")], [prefix_length])


def varlen_prefix_lm(cu_seqlens: Any, prefix_lengths: Any) -> AttnMask:
    """`prefix_lm` inside packed documents, each with a prefix of its own length. Two rows a document.

    Raises:
        ValueError: not one prefix a document, or one longer than its document.
    """
    edges, prefixes = as_cu_seqlens(cu_seqlens, "cu_seqlens"), as_lengths(prefix_lengths, "prefix_lengths")
    if len(prefixes) != len(edges) - 1 or (prefixes > np.diff(edges)).any():
        raise ValueError(
            f"prefix_lengths must be one for each of the {len(edges) - 1} documents, none longer than its document "
            f"({np.diff(edges).tolist()[:8]}), got {prefixes.tolist()[:8]}"
        )
    start, split, end = edges[:-1], edges[:-1] + prefixes, edges[1:]
    whole, prefix, rest = (np.stack(pair, axis=1) for pair in ((start, end), (start, split), (split, end)))
    types = np.repeat([FULL, CAUSAL], len(prefixes))
    bands = bands_from_slices(np.concatenate([whole, rest]), np.concatenate([prefix, rest]), types)
    return make_mask(bands, int(edges[-1]), int(edges[-1]))


def shared_prefix(lengths: Any, parents: Any) -> AttnMask:
    """A tree of texts: each is causal in itself and sees all of its ancestors. A prompt with many answers is the tree of depth two.

        #.....       lengths [2, 2, 2], parents [-1, 0, 0]
        ##....
        ###...
        ####..
        ##..#.
        ##..##

    Args:
        lengths: tokens of each text, in the order in which they are laid out.
        parents: the text that each continues, -1 for a prompt; always an earlier one.

    One row a text, and one for each run of neighbouring texts below an ancestor: laid out depth first, at most two a text.

    Raises:
        ValueError: not one parent a text, or a parent that does not come before its text.
    """
    sizes, above = as_lengths(lengths, "lengths"), as_ints(parents, "parents")
    order = np.arange(len(sizes))
    if len(above) != len(sizes) or ((above < -1) | (above >= order[: len(above)])).any():
        raise ValueError(
            "parents must be one for each text: -1, or the index of an earlier text; got "
            f"{above.tolist()[:12]} for {len(sizes)} texts"
        )
    edges = np.concatenate([[0], np.cumsum(sizes)])
    pairs = [np.empty((0, 2), np.int64)]
    text, ancestor = order[above >= 0], above[above >= 0]
    while len(text):  # once a level of the tree
        pairs.append(np.stack([ancestor, text], axis=1))
        deeper = above[ancestor] >= 0
        text, ancestor = text[deeper], above[ancestor[deeper]]
    pair = np.concatenate(pairs)
    pair = pair[np.lexsort((pair[:, 1], pair[:, 0]))]
    opens = np.flatnonzero((np.diff(pair[:, 0], prepend=-1) != 0) | (np.diff(pair[:, 1], prepend=-2) != 1))
    closes = np.append(opens[1:], len(pair))[: len(opens)] - 1
    seen = pair[opens, 0]
    q_ranges = np.stack([edges[pair[opens, 1]], edges[pair[closes, 1] + 1]], axis=1)
    own, prefixes = ranges_of(edges), np.stack([edges[seen], edges[seen + 1]], axis=1)
    types = np.concatenate([np.full(len(own), CAUSAL), np.full(len(seen), FULL)])
    bands = bands_from_slices(np.concatenate([own, q_ranges]), np.concatenate([own, prefixes]), types)
    return make_mask(bands, int(edges[-1]), int(edges[-1]))


def multimodal(num_tokens: int, image_spans: Any, cu_seqlens: Any = None) -> AttnMask:
    """Causal text in which the tokens of an image see all of their image. One row a document, one more an image.

        #.....       an image of tokens 1, 2 and 3
        ####..
        ####..
        ####..
        #####.
        ######

    Args:
        image_spans: ``[n, 2]`` half-open ranges of tokens, disjoint.
        cu_seqlens: packed documents; left out, one of all tokens.

    Raises:
        ValueError: spans that overlap, leave the sequence or cross the border of a document.
    """
    num_tokens = check_length(num_tokens, "num_tokens")
    edges = as_cu_seqlens([0, num_tokens] if cu_seqlens is None else cu_seqlens, "cu_seqlens")
    spans = as_pairs(image_spans, "image_spans")
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    start, end = spans.T
    if edges[-1] != num_tokens:
        raise ValueError(f"cu_seqlens must end at num_tokens, {num_tokens}, got {int(edges[-1])}")
    if (start < 0).any() or (start > end).any() or (end > num_tokens).any() or (end[:-1] > start[1:]).any():
        raise ValueError(f"image_spans must be disjoint ranges inside [0, {num_tokens}), got {spans.tolist()[:8]}")
    crossing = np.searchsorted(edges, start, side="right") <= np.searchsorted(edges, end, side="left") - 1
    if crossing.any():
        raise ValueError(f"an image must lie inside one document, but {spans[crossing][0].tolist()} crosses a border")
    text = bands_from_slices(ranges_of(edges), ranges_of(edges), np.full(len(edges) - 1, CAUSAL))
    # What causality leaves out of an image: the cells right of its diagonal.
    rest = np.stack([start, end, start, end, np.ones_like(start), end - start], axis=1)
    return make_mask(np.concatenate([text, rest]), num_tokens, num_tokens)


def cross_attention(cu_seqlens_q: Any, cu_seqlens_k: Any) -> AttnMask:
    """Packed pairs: the queries of each attend the keys of the same one. One row a pair."""
    return varlen(cu_seqlens_q, cu_seqlens_k)


def _lengths(num_q: int, num_k: int | None) -> tuple[int, int]:
    num_q = check_length(num_q, "num_q")
    return num_q, num_q if num_k is None else check_length(num_k, "num_k")


def _of_ranges(q_ranges: Ints, k_ranges: Ints, kind: int, num_q: int, num_k: int) -> AttnMask:
    return make_mask(bands_from_slices(q_ranges, k_ranges, np.full(len(q_ranges), kind)), num_q, num_k)


def _rectangles(q0: Ints, q1: Ints, k0: Ints, k1: Ints, num_tokens: int) -> AttnMask:
    return _of_ranges(np.stack([q0, q1], axis=1), np.stack([k0, k1], axis=1), FULL, num_tokens, num_tokens)


def _blocks_of(edges: Ints, block_size: int) -> tuple[Ints, Ints]:
    """``(document, block inside it)`` of every block."""
    return expand(np.zeros(len(edges) - 1, np.int64), -(-np.diff(edges) // block_size))
