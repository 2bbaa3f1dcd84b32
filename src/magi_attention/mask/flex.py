"""From and to PyTorch's flex_attention: ``mask_mod`` functions and ``BlockMask``. Imported where a mask is converted, not before."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.bands import Ints, area, split_k, split_q
from magi_attention.mask.builders import make_mask
from magi_attention.mask.cells import equal_runs, runs_by_line, stack_runs
from magi_attention.mask.index_ranges import NotReadableError
from magi_attention.mask.inputs import check_length
from magi_attention.mask.mask_mod import (
    Cells,
    Question,
    check_num_cells,
    reads_batch,
    reads_head,
    warn_of_cells,
)
from magi_attention.mask.simplify import merge_bands
from magi_attention.mask.tile_bounds import MaskMod, tile_bounds

_TILE = 128
# Keys of a tile where every cell is evaluated anyhow: longer lines are faster.
_WIDE_TILE = 4096
# Cells evaluated at once, and tiles bounded at once: bounds the memory, not the result.
_CELLS_AT_ONCE = 1 << 20
_TILES_AT_ONCE = 1 << 20
# Tiles of one mask: minutes of work. A square of 4 million tokens.
_MOST_TILES = 1 << 30


def from_mask_mod(
    mask_mod: MaskMod,
    num_q: int,
    num_k: int | None = None,
    *,
    num_batches: int | None = None,
    num_heads: int | None = None,
    device: str | torch.device = "cpu",
) -> AttnMask:
    """The mask of a ``mask_mod(b, h, q, k)``, exactly.

    Tiles of 128 x 128 in which the function is proved to be constant (by interval arithmetic, see ``mask.tile_bounds``) are not
    looked at; every cell of all others is. The proof follows comparisons, logic, sums, products, floor divisions, remainders, shifts,
    ``where``, ``clamp``, ``isin``, conversions between ints and booleans, and look-ups in tensors. A function that does something else
    is evaluated everywhere: that is a UserWarning which says what stopped the proof, and up to 2^30 cells (`mask_mod.MOST_CELLS`).

    Args:
        num_batches, num_heads: how many there are, for a function that reads ``b`` or ``h``: it must say the same for all.
        device: where the function is evaluated: where the tensors are that it reads.

    Raises:
        ValueError: it reads ``b`` or ``h`` and their numbers are not given, or it says different things for two of them; or it is not
            what flex_attention takes: it fails, branches on the value of an index, or returns something else than booleans; or too
            many cells have to be evaluated: above 2^30 where the proof cannot follow, above 2^34 in tiles that it does not decide.
    """
    num_q = check_length(num_q, "num_q")
    num_k = num_q if num_k is None else check_length(num_k, "num_k")
    masks = []
    pairs, stopped = _batches_and_heads(mask_mod, (num_q, num_k), num_batches, num_heads, device), None
    for b, h in pairs:
        question, size = Question(mask_mod, b, h, (num_q, num_k), device), (_TILE, _TILE)
        try:
            if num_q and num_k:
                # What stops the proof in one tile of all stops it before there is a grid of tiles.
                _bounds(question, question.lengths)
            always, ever = _bounds(question, size)
            question = replace(question, is_elementwise=True)
            check_num_cells(int((ever & ~always).sum()) * _TILE * _TILE * len(pairs), None)
        except NotReadableError as error:
            if stopped is None:
                check_num_cells(num_q * num_k * len(pairs), error)
                warn_of_cells(error, num_q * num_k * len(pairs))
            stopped, size = error, (_TILE, _WIDE_TILE)
            ever = np.ones((-(-num_q // _TILE), -(-num_k // _WIDE_TILE)), bool)
            always = np.zeros_like(ever)
        rows = _rows_of_tiles(always, ever & ~always, question, size)
        masks.append(make_mask(rows, num_q, num_k))
    return _the_only(masks, "the mask_mod")


def from_block_mask(block_mask: BlockMask, *, num_batches: int | None = None, num_heads: int | None = None) -> AttnMask:
    """The mask that flex_attention computes with a ``BlockMask``: its full blocks whole, its partial ones by its ``mask_mod``.

    Args:
        num_batches, num_heads: how many there are; left out, as the blocks have. Where blocks are shared (size 1) and the
            ``mask_mod`` reads ``b`` or ``h``, they have to be given.

    Raises:
        ValueError: masks that differ between batches or heads, or that cannot be told to be equal; a ``mask_mod`` that fails.
    """
    if not isinstance(block_mask, BlockMask):
        raise ValueError(
            f"block_mask must be a BlockMask of flex_attention, got {type(block_mask).__name__}; for a function, use from_mask_mod"
        )
    blocks_b, blocks_h = block_mask.kv_num_blocks.shape[:2]
    num_batches = blocks_b if num_batches is None and blocks_b > 1 else num_batches
    num_heads = blocks_h if num_heads is None and blocks_h > 1 else num_heads
    num_q, num_k = (int(length) for length in block_mask.seq_lengths)
    device = block_mask.kv_num_blocks.device
    masks = []
    pairs = _batches_and_heads(block_mask.mask_mod, (num_q, num_k), num_batches, num_heads, device)
    for b, h in pairs:
        at = (b if blocks_b > 1 else 0, h if blocks_h > 1 else 0)
        size = (int(block_mask.BLOCK_SIZE[0]), int(block_mask.BLOCK_SIZE[1]))
        shape = (-(-num_q // size[0]), -(-num_k // size[1]))
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, at, shape)
        partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, at, shape) & ~full
        question = Question(block_mask.mask_mod, b, h, (num_q, num_k), device)
        stopped = _what_stops(question, size)
        check_num_cells(int(partial.sum()) * size[0] * size[1] * len(pairs), stopped)
        rows = _rows_of_tiles(full, partial, replace(question, is_elementwise=stopped is None), size)
        masks.append(make_mask(rows, num_q, num_k))
    return _the_only(masks, "the BlockMask")


def to_mask_mod(mask: AttnMask, device: str | torch.device = "cpu") -> MaskMod:
    """A ``mask_mod(b, h, q, k)`` that says of every cell what the mask does. Indices must lie inside the lengths.

    Its cost a cell grows with the most rows that any one query has; it holds one int32 a query.
    """
    edges = np.unique(np.concatenate([[0, mask.num_q], mask.bands[:, 0], mask.bands[:, 1]]))
    pieces, _, segment = split_q(mask.bands, edges[:-1], edges[1:])
    order = np.argsort(segment, kind="stable")
    pieces, segment = pieces[order], segment[order]
    place = np.arange(len(segment)) - np.searchsorted(segment, segment, side="left")
    depth = int(place.max(initial=-1)) + 1
    table = np.zeros((depth, max(len(edges) - 1, 1), 4), np.int64)  # an empty key range where there is no row
    table[place, segment] = pieces[:, 2:]
    columns = [[torch.as_tensor(column, dtype=torch.int32, device=device) for column in part.T] for part in table]
    segment_of = torch.as_tensor(np.repeat(np.arange(len(edges) - 1), np.diff(edges)), dtype=torch.int32, device=device)

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = q < 0  # nothing
        if columns:
            at = segment_of[q]
            for k0, k1, lo, hi in columns:
                attended = attended | ((k >= k0[at]) & (k < k1[at]) & (k - q >= lo[at]) & (k - q <= hi[at]))
        return attended

    return mask_mod


def to_block_mask(
    mask: AttnMask, block_size: int | tuple[int, int] = 128, device: str | torch.device = "cpu"
) -> BlockMask:
    """The ``BlockMask`` of the mask, shared by all batches and heads: which blocks are full and which partial is counted from the
    rows' areas, no cell is looked at. Its ``mask_mod`` is that of `to_mask_mod`."""
    size_q, size_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    q_ranges, k_ranges = _tile_ranges(mask.num_q, size_q), _tile_ranges(mask.num_k, size_k)
    pieces, _, row = split_q(mask.bands, *q_ranges.T)
    pieces, piece, column = split_k(pieces, *k_ranges.T)
    cells = np.zeros((len(q_ranges), len(k_ranges)), np.int64)
    np.add.at(cells, (row[piece], column), area(pieces))
    whole = cells == np.outer(*(np.diff(ranges, axis=1)[:, 0] for ranges in (q_ranges, k_ranges)))
    # The kernel takes full blocks as they are: one that leaves the sequence is not.
    whole[:, k_ranges[:, 1] - k_ranges[:, 0] < size_k] = False
    whole[q_ranges[:, 1] - q_ranges[:, 0] < size_q] = False
    options: dict[str, Any] = {}
    if "seq_lengths" in inspect.signature(BlockMask.from_kv_blocks).parameters:
        options["seq_lengths"] = (mask.num_q, mask.num_k)
    return BlockMask.from_kv_blocks(
        *_as_lists((cells > 0) & ~whole, device),
        *_as_lists(whole, device),
        BLOCK_SIZE=(size_q, size_k),
        mask_mod=to_mask_mod(mask, device),
        **options,
    )


def _tile_ranges(length: int, size: int) -> Ints:
    starts = np.arange(0, length, size)
    return np.stack([starts, np.minimum(starts + size, length)], axis=1)


def _bounds(question: Question, size: tuple[int, int]) -> tuple[Cells, Cells]:
    """`tile_bounds`, strip by strip."""
    q_ranges, k_ranges = (_tile_ranges(*pair) for pair in zip(question.lengths, size, strict=True))
    shape = (len(q_ranges), len(k_ranges))
    if shape[0] * shape[1] > _MOST_TILES:
        raise ValueError(
            f"a mask_mod is read up to {_MOST_TILES:,} tiles of {size[0]} x {size[1]} cells, got {question.lengths[0]:,} queries and "
            f"{question.lengths[1]:,} keys; make longer masks by varlen, sliding_window, from_document_ids and the like"
        )
    always, ever = np.zeros(shape, bool), np.zeros(shape, bool)
    here_b, here_h = torch.tensor(question.b), torch.tensor(question.h)
    strip = max(_TILES_AT_ONCE // max(shape[1], 1), 1)
    for at in range(0, shape[0] if shape[1] else 0, strip):
        part = torch.from_numpy(q_ranges[at : at + strip])
        low, high = tile_bounds(question.mask_mod, here_b, here_h, part, torch.from_numpy(k_ranges))
        always[at : at + strip], ever[at : at + strip] = low.numpy(), high.numpy()
    return always, ever


def _what_stops(question: Question, size: tuple[int, int]) -> NotReadableError | None:
    """What the proof cannot follow, if there is something."""
    try:
        _bounds(question, size)
    except NotReadableError as error:
        return error
    return None


def _rows_of_tiles(full: Cells, partial: Cells, question: Question, size: tuple[int, int]) -> Ints:
    """The rows of full tiles, and of the attended cells of partial ones, which are evaluated."""
    full = full.copy()
    tile_q, tile_k = np.nonzero(partial)
    parts = []
    step = max(_CELLS_AT_ONCE // (size[0] * size[1]), 1)
    for at in range(0, len(tile_q), step):
        q_start, k_start = tile_q[at : at + step] * size[0], tile_k[at : at + step] * size[1]
        cells = question.ask(q_start, k_start, size)
        whole = cells.all(axis=(1, 2))
        full[tile_q[at : at + step][whole], tile_k[at : at + step][whole]] = True
        tile, cells = np.flatnonzero(~whole), cells[~whole]
        line, begin, end = runs_by_line(cells.reshape(-1, size[1]))
        tile, query = tile[line // size[0]], line % size[0]
        parts.append(np.stack([q_start[tile] + query, k_start[tile] + begin, k_start[tile] + end], axis=1))
    # Whole tiles at the border are cut where the sequence ends.
    rows = equal_runs(full)
    rows = np.stack([rows[:, 0] * size[0], rows[:, 1] * size[0], rows[:, 2] * size[1], rows[:, 3] * size[1]], axis=1)
    rows = np.minimum(rows, np.repeat(question.lengths, 2))
    q0, q1, k0, k1 = rows.T
    rectangles = np.stack([q0, q1, k0, k1, k0 - q1 + 1, k1 - 1 - q0], axis=1)
    runs = np.concatenate([np.empty((0, 3), np.int64), *parts])
    return merge_bands(np.concatenate([rectangles, stack_runs(*runs.T)]))


def _batches_and_heads(
    mask_mod: MaskMod,
    lengths: tuple[int, int],
    num_batches: int | None,
    num_heads: int | None,
    device: str | torch.device,
) -> list[tuple[int, int]]:
    """The pairs ``(b, h)`` to ask about; one alone where the function reads neither. ValueError where it cannot be asked."""
    if not all(lengths):
        return [(0, 0)]  # there is no cell that it could say something of
    first, question = np.zeros(1, np.int64), Question(mask_mod, 0, 0, lengths, device)
    replace(question, is_elementwise=_what_stops(question, lengths) is None).ask(first, first, (1, 1))
    given = {"num_batches": num_batches, "num_heads": num_heads}
    counts = {name: 1 if count is None else check_length(count, name, 1) for name, count in given.items()}
    reads = {"num_batches": reads_batch(mask_mod, device), "num_heads": reads_head(mask_mod, device)}
    unknown = [name for name, count in given.items() if count is None and reads[name]]
    if unknown:
        indices = " and ".join(name.removeprefix("num_")[0] for name in unknown)
        raise ValueError(
            f"the mask_mod reads {indices}, so that one mask cannot be proved to hold for all: give {' and '.join(unknown)}, and it is "
            "checked for each"
        )
    batches, heads = (range(counts[name] if reads[name] else 1) for name in given)
    return [(b, h) for b in batches for h in heads]


def _the_only(masks: list[AttnMask], what: str) -> AttnMask:
    if not all(mask.attends_same(masks[0]) for mask in masks[1:]):
        raise ValueError(
            f"{what} attends different cells for different batches or heads, which one mask cannot tell: convert each by itself, with "
            "a mask_mod of that batch and head"
        )
    return masks[0]


def _listed(num_blocks: Tensor | None, indices: Tensor | None, at: tuple[int, int], shape: tuple[int, int]) -> Cells:
    """``shape`` bool: the blocks that a BlockMask's lists name."""
    named = np.zeros(shape, bool)
    if num_blocks is None or indices is None:
        return named
    counts, columns = num_blocks[at].cpu().numpy()[: shape[0]], indices[at].cpu().numpy()[: shape[0]]
    row, place = np.nonzero(np.arange(columns.shape[1]) < counts[:, None])
    column = columns[row, place]
    inside = column < shape[1]
    named[row[inside], column[inside]] = True
    return named


def _as_lists(named: Cells, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """``[1, 1, rows]`` and ``[1, 1, rows, columns]`` int32: how many blocks each row names, and those first, ascending."""
    counts = torch.as_tensor(named.sum(axis=1), dtype=torch.int32, device=device)
    order = torch.as_tensor(np.argsort(~named, axis=1, kind="stable"), dtype=torch.int32, device=device)
    return counts[None, None], order[None, None]
