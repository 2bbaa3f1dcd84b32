"""Masks told block by block: which blocks of keys each block of queries attends.

    queries in blocks of 2, keys in blocks of 3:      ###...      block_sparse [[1, 0], [0, 1]]
                                                      ###...      block indices [[0], [1]]
                                                      ...###
                                                      ...###

Shapes: num_blocks_q, num_blocks_k blocks, of which the last may be shorter; topk blocks of keys listed for each block of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask.bands import Ints
from magi_attention.mask.builders import make_mask
from magi_attention.mask.cells import runs_by_line, stack_runs
from magi_attention.mask.inputs import as_array, as_bounds, check_length
from magi_attention.mask.simplify import merge_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask


def block_sparse(
    matrix: Any, block: int | Sequence[int], num_q: int | None = None, num_k: int | None = None
) -> AttnMask:
    """Blocks of queries that attend blocks of keys. Equal runs of adjacent rows of the matrix are one row of the mask.

    Args:
        matrix: ``[num_blocks_q, num_blocks_k]`` bool (or 0 and 1), True where attended; array or tensor.
        block: tokens of a block, or ``(q_block_size, k_block_size)``.
        num_q, num_k: lengths in tokens, of which the last block may hold fewer than its size; omitted, whole blocks.

    Raises:
        ValueError: not a matrix of booleans, a size below 1, or lengths of another number of blocks.
    """
    cells = as_array(matrix, "matrix")
    if cells.ndim != 2 or (cells.dtype != bool and not np.isin(cells, (0, 1)).all()):
        raise ValueError(
            "matrix must be [num_blocks_q, num_blocks_k] of booleans, True where attended, got shape "
            f"{list(cells.shape)} of {cells.dtype}; a mask that differs between heads is one mask for each of them"
        )
    sizes = tuple(block) if isinstance(block, Sequence) else (block, block)
    if len(sizes) != 2:
        raise ValueError(f"block must be an int or a pair (q_block_size, k_block_size), got {block!r}")
    size_q, size_k = (check_length(size, "block", 1) for size in sizes)
    num_q = _length(num_q, cells.shape[0], size_q, "num_q")
    num_k = _length(num_k, cells.shape[1], size_k, "num_k")
    runs = stack_runs(*runs_by_line(cells.astype(bool, copy=False)))
    return make_mask(merge_bands(in_tokens(runs, (size_q, size_k), (num_q, num_k))), num_q, num_k)


def from_block_indices(
    indices: Any,
    q_block_size: int = 1,
    k_block_size: int = 1,
    num_q: int | None = None,
    num_k: int | None = None,
) -> AttnMask:
    """The mask of the key blocks that each query block lists, as ``index_attn_indices`` of `flex_flash_attn_func` does.

    Args:
        indices: ``[num_blocks_q, topk]`` ints, or ``[num_blocks_q, num_heads_kv, topk]`` if all heads list the same blocks; -1 is
            padding at the end of a list.
        q_block_size, k_block_size: tokens of a block.
        num_q: omitted, whole blocks. num_k: omitted, up to the last block that is listed.

    Raises:
        ValueError: heads that list different blocks; a block that is listed twice, or does not exist; padding before a block; lengths of
            another number of blocks.
    """
    table = as_bounds(indices, "indices")
    if table.ndim == 3 and table.shape[1]:
        if not (np.sort(table, axis=2, kind="stable") == np.sort(table[:, :1], axis=2, kind="stable")).all():
            raise ValueError(
                "indices differ between heads, which one mask cannot tell: make a mask of indices[:, head] for each head"
            )
        table = table[:, 0]
    if table.ndim != 2:
        raise ValueError(
            f"indices must be ints of shape [num_blocks_q, topk] or [num_blocks_q, num_heads_kv, topk], got shape {list(table.shape)}"
        )
    size_q, size_k = check_length(q_block_size, "q_block_size", 1), check_length(k_block_size, "k_block_size", 1)
    num_q = _length(num_q, len(table), size_q, "num_q")
    most = int(table.max(initial=-1)) + 1
    num_k = check_length(most * size_k if num_k is None else num_k, "num_k")
    check_indices(table, -(-num_k // size_k), "indices")
    check_listed_once(table, "indices")
    runs = stack_runs(*runs_of_indices(table))
    return make_mask(merge_bands(in_tokens(runs, (size_q, size_k), (num_q, num_k))), num_q, num_k)


def check_indices(table: Ints, num_blocks_k: int, name: str) -> None:
    """ValueError where an entry of ``[..., topk]`` is no block, or padding stands before a block."""
    wrong = np.argwhere((table < -1) | (table >= num_blocks_k))
    if len(wrong):
        at = wrong[0].tolist()
        raise ValueError(
            f"{name} must be blocks in [0, {num_blocks_k}), or -1 as padding at the end of a list, got {int(table[tuple(at)])} at {at}"
        )
    wrong = np.argwhere((table[..., :-1] < 0) & (table[..., 1:] >= 0))
    if len(wrong):
        raise ValueError(
            f"{name} must have its padding, -1, at the end of a list, got a block behind padding at {wrong[0].tolist()}; sort each "
            "list, largest first, or move the padding"
        )


def check_listed_once(table: Ints, name: str) -> None:
    """ValueError where a list of ``[..., topk]`` repeats a block."""
    ordered = np.sort(table, axis=-1, kind="stable")
    wrong = np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0))
    if len(wrong):
        at = wrong[0].tolist()
        raise ValueError(
            f"{name} must list a block of keys once, got {int(ordered[tuple(at)])} twice in the list at {at[:-1]}; remove the second, or "
            "make it padding (-1) at the end"
        )


def runs_of_indices(table: Ints) -> tuple[Ints, Ints, Ints]:
    """``(block of queries, begin, end)`` of each run of adjacent blocks in the lists ``[num_blocks_q, topk]``, ``[n]`` each."""
    ordered = np.sort(table, axis=1, kind="stable")
    line, place = np.nonzero(ordered >= 0)
    listed = ordered[line, place].astype(np.int64)
    opens = np.append(True, (np.diff(line) != 0) | (np.diff(listed) > 1))[: len(line)]
    closes = np.append(opens[1:], True)[: len(line)]
    return line[opens], listed[opens], listed[closes] + 1


def in_tokens(runs: Ints, sizes: tuple[int, int], lengths: tuple[int, int]) -> Ints:
    """``[n, 6]`` rows of whole rectangles, from rows of which ranges count blocks; the last blocks end with the tokens."""
    q0, q1, k0, k1 = runs[:, :4].T
    q0, q1 = q0 * sizes[0], np.minimum(q1 * sizes[0], lengths[0])
    k0, k1 = k0 * sizes[1], np.minimum(k1 * sizes[1], lengths[1])
    return np.stack([q0, q1, k0, k1, k0 - q1 + 1, k1 - 1 - q0], axis=1)


def _length(length: int | None, num_blocks: int, size: int, name: str) -> int:
    length = check_length(num_blocks * size if length is None else length, name)
    if -(-length // size) != num_blocks:
        raise ValueError(
            f"{name} must end in the last of {num_blocks} blocks of {size} tokens, in ({(num_blocks - 1) * size}, {num_blocks * size}], "
            f"got {length}"
        )
    return length
