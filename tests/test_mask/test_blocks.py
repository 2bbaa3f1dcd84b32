"""Masks of blocks, against the matrix of cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from magi_attention.mask import AttnMask


def in_cells(matrix: np.ndarray, sizes: tuple[int, int], lengths: tuple[int, int]) -> np.ndarray:
    return matrix.repeat(sizes[0], axis=0).repeat(sizes[1], axis=1)[: lengths[0], : lengths[1]]


@pytest.mark.parametrize("seed", range(20))
def test_both_ways_of_telling_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, shape = tuple(rng.integers(1, 6, 2).tolist()), tuple(rng.integers(1, 8, 2).tolist())
    lengths = tuple(count * size - int(rng.integers(size)) for count, size in zip(shape, sizes, strict=True))
    matrix = rng.random(shape) < rng.random()
    dense = in_cells(matrix, sizes, lengths)
    mask = AttnMask.block_sparse(matrix, sizes, *lengths)
    mask.validate()
    np.testing.assert_array_equal(mask.to_dense(), dense)
    np.testing.assert_array_equal(
        AttnMask.block_sparse(torch.from_numpy(matrix), sizes).to_dense(),
        in_cells(matrix, sizes, (shape[0] * sizes[0], shape[1] * sizes[1])),
    )
    topk = int(matrix.sum(axis=1).max()) + 1
    lists = np.full((shape[0], topk), -1, np.int32)
    for row, line in enumerate(matrix):
        lists[row, : line.sum()] = rng.permutation(np.flatnonzero(line))
    assert AttnMask.from_block_indices(lists, *sizes, *lengths) == mask
    heads = torch.from_numpy(lists)[:, None].expand(-1, 3, -1)
    assert AttnMask.from_block_indices(heads, *sizes, *lengths) == mask


def test_few_rows() -> None:
    assert AttnMask.block_sparse(np.tri(64, dtype=bool), 1) == AttnMask.causal(64)
    assert AttnMask.block_sparse(np.ones((5, 7)), 10) == AttnMask.full(50, 70)
    assert len(AttnMask.block_sparse(np.eye(9, dtype=bool).repeat(4, axis=0), (16, 32)).bands) == 9
    assert AttnMask.from_block_indices([[0, 1], [1, 0]], 4, 4) == AttnMask.full(8)
    assert AttnMask.from_block_indices(np.empty((3, 0), int), 4, 4, num_k=9) == AttnMask.full(12, 9).restrict((0, 0))


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: AttnMask.block_sparse([[0, 2]], 4), "matrix must be .* of booleans"),
        (lambda: AttnMask.block_sparse(np.ones((1, 2, 2), bool), 4), "one mask for each"),
        (lambda: AttnMask.block_sparse([[1]], 0), "block must be an int of 1 or more, got 0"),
        (lambda: AttnMask.block_sparse([[1]], (4, 4, 4)), r"pair \(q_block_size, k_block_size\)"),
        (
            lambda: AttnMask.block_sparse([[1]], 4, 5),
            r"num_q must end in the last of 1 blocks of 4 tokens, in \(0, 4\], got 5",
        ),
        (
            lambda: AttnMask.block_sparse([[1, 1]], 4, 4, 4),
            r"num_k must end in the last of 2 blocks .* in \(4, 8\], got 4",
        ),
        (lambda: AttnMask.block_sparse([[1] * 2] * 2, 1 << 30), "num_q must be at most 2,147,483,647"),
        (lambda: AttnMask.from_block_indices([[0, 3]], 4, 4, 4, 12), r"blocks in \[0, 3\), .* got 3 at \[0, 1\]"),
        (lambda: AttnMask.from_block_indices([[0, -2]], 4, 4), r"got -2 at \[0, 1\]"),
        (lambda: AttnMask.from_block_indices([[-1, 0]], 4, 4), r"a block behind padding at \[0, 0\]"),
        (
            lambda: AttnMask.from_block_indices([[0, 1, 0]], 4, 4),
            r"list a block of keys once, got 0 twice in the list at \[0\]",
        ),
        (lambda: AttnMask.from_block_indices([[[0], [1]]], 4, 4), "differ between heads"),
        (lambda: AttnMask.from_block_indices([[0.0]], 4, 4), "indices must be ints"),
        (lambda: AttnMask.from_block_indices([0, 1], 4, 4), r"shape \[num_blocks_q, topk\]"),
        (lambda: AttnMask.from_block_indices([[0]], 4, 0), "k_block_size must be an int of 1 or more"),
        (lambda: AttnMask.from_block_indices([[2**40]], 4, 4), "num_k must be at most 2,147,483,647"),
    ],
)
def test_mistakes_are_told(build: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build()
