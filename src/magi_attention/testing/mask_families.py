"""The catalogue of masks that every attention test runs over, small enough for a dense oracle and awkward on purpose.

    MASK_FAMILIES["varlen_causal"](193) -> Slices

A family is a function of a length in tokens, 16 or more. All slices of a family attend disjoint cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from magi_attention.kernels.interface import KernelMask
from magi_attention.mask.bands import bands_from_slices

FULL, CAUSAL, INVCAUSAL, BICAUSAL = range(4)
Slice = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Slices:
    """``rows``: ``(q0, q1, k0, k1, type)`` each, over ``num_q`` queries and ``num_k`` keys."""

    rows: tuple[Slice, ...]
    num_q: int
    num_k: int

    @property
    def q_ranges(self) -> list[list[int]]:
        return [[q0, q1] for q0, q1, *_ in self.rows]

    @property
    def k_ranges(self) -> list[list[int]]:
        return [[k0, k1] for _, _, k0, k1, _ in self.rows]

    @property
    def types(self) -> list[int]:
        return [kind for *_, kind in self.rows]

    def kernel_mask(self) -> KernelMask:
        table = np.asarray(self.rows, np.int64).reshape(-1, 5)
        return KernelMask(bands_from_slices(table[:, :2], table[:, 2:4], table[:, 4]), self.num_q, self.num_k)

    def tables(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """``q_ranges [n, 2], k_ranges [n, 2], types [n]``, int32, as the public functions take them."""
        table = torch.tensor(self.rows, dtype=torch.int32, device=device).reshape(-1, 5)
        return table[:, :2], table[:, 2:4], table[:, 4]

    def dense(self) -> Tensor:
        """``[num_q, num_k]`` bool, cell by cell as the public table of mask types says, not by way of bands."""
        count = torch.zeros(self.num_q, self.num_k, dtype=torch.int64)
        for q0, q1, k0, k1, kind in self.rows:
            i, j = torch.arange(q0, q1)[:, None], torch.arange(k0, k1)[None, :]
            cells = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            if kind in (CAUSAL, BICAUSAL):
                cells &= j - i <= k1 - q1
            if kind in (INVCAUSAL, BICAUSAL):
                cells &= j - i >= k0 - q0
            count[q0:q1, k0:k1] += cells
        assert count.max().item() <= 1 if count.numel() else True, "a family lists a cell twice"
        return count > 0


def _square(rows: list[Slice], n: int) -> Slices:
    return Slices(tuple(rows), n, n)


def _cut(n: int, lengths: list[int]) -> list[tuple[int, int]]:
    """Documents of these lengths, over and over, until n tokens are cut."""
    documents: list[tuple[int, int]] = []
    start = 0
    while start < n:
        end = min(n, start + lengths[len(documents) % len(lengths)])
        documents.append((start, end))
        start = end
    return documents


def _varlen(kind: int, *lengths: int) -> Callable[[int], Slices]:
    return lambda n: _square([(a, b, a, b, kind) for a, b in _cut(n, list(lengths))], n)


def _bi_causal(n: int) -> Slices:
    third = n // 3
    return _square([(0, third, 0, n, BICAUSAL), (third, n, third // 2, n - 1, BICAUSAL), (third, n, n - 1, n, FULL)], n)


def _window(n: int) -> Slices:
    """Each query sees itself and the 30 before it."""
    width = min(31, n)
    return _square([(0, width, 0, width, CAUSAL), (width, n, 1, n, BICAUSAL)], n)


def _window_both_sides(n: int) -> Slices:
    """Each query sees 17 on either side."""
    reach = 17
    if n <= 2 * reach:
        return _square([(0, n, 0, n, FULL)], n)
    middle = (reach, n - reach, 0, n, BICAUSAL)
    return _square([(0, reach, 0, 2 * reach, CAUSAL), middle, (n - reach, n, n - 2 * reach, n, INVCAUSAL)], n)


def _block_causal(n: int) -> Slices:
    return _square([(a, b, 0, b, FULL) for a, b in _cut(n, [32])], n)


def _varlen_block_causal(n: int) -> Slices:
    rows = []
    for start, end in _cut(n, [67, 29, 97]):
        rows += [(start + a, start + b, start, start + b, FULL) for a, b in _cut(end - start, [24])]
    return _square(rows, n)


def _shared_prefix(n: int) -> Slices:
    prefix = n // 3
    rows: list[Slice] = [(0, prefix, 0, prefix, CAUSAL)]
    for a, b in _cut(n - prefix, [23, 41, 1]):
        rows += [(prefix + a, prefix + b, 0, prefix, FULL), (prefix + a, prefix + b, prefix + a, prefix + b, CAUSAL)]
    return _square(rows, n)


def _prefix_lm(n: int) -> Slices:
    prefix = n // 4
    return _square([(0, n, 0, prefix, FULL), (prefix, n, prefix, n, CAUSAL)], n)


def _split_by_diagonal(n: int) -> Slices:
    """The full square as two slices whose rectangles overlap nearly everywhere and whose cells do not."""
    return _square([(0, n, 0, n, CAUSAL), (0, n, 1, n, INVCAUSAL)], n)


def _empty_rows(n: int) -> Slices:
    """Queries and keys without a partner at both ends and in the middle; empty ranges; a BICAUSAL slice without cells."""
    a, b, c = n // 7, n // 2, n // 2 + n // 5
    rows = [(a, b, a // 2, b, CAUSAL), (c, n - 3, c, n - 4, FULL), (b, b, 0, n, FULL), (b, c, 4, 4, CAUSAL)]
    return _square([*rows, (b, c, 0, (c - b) // 2, BICAUSAL)], n)


def _one_token_documents(n: int) -> Slices:
    """A third of the tokens alone, the rest in a document of two and one long one."""
    ones = n // 3
    rows = [(i, i + 1, i, i + 1, CAUSAL) for i in range(ones)]
    return _square([*rows, (ones, ones + 2, ones, ones + 2, CAUSAL), (ones + 2, n, ones + 2, n, CAUSAL)], n)


def _more_queries(n: int) -> Slices:
    """Fewer keys than queries: CAUSAL leaves the first queries without any."""
    return Slices(((0, n, 0, n - n // 3, CAUSAL),), n, n - n // 3)


def _more_keys(n: int) -> Slices:
    return Slices(((0, n - n // 2, 0, n, CAUSAL),), n - n // 2, n)


def _cross_documents(n: int) -> Slices:
    """Packed pairs, each of its own lengths of queries and keys, of every type."""
    q_documents, k_documents = _cut(n, [37, 1, 53, 19]), _cut(n + n // 2, [61, 43, 5, 71])
    pairs = list(zip(q_documents, k_documents, strict=False))
    rows = tuple((a, b, c, d, index % 4) for index, ((a, b), (c, d)) in enumerate(pairs))
    return Slices(rows, n, n + n // 2)


def random_slices(num_q: int, num_k: int, seed: int) -> Slices:
    """Random disjoint rectangles of random types, in random order: some empty, some a token wide, many rows touched twice."""
    rng = np.random.default_rng(seed)
    rows: list[Slice] = []
    q_cuts = np.unique(np.concatenate([[0, num_q], rng.integers(0, num_q + 1, rng.integers(1, 9))]))
    for q0, q1 in zip(q_cuts[:-1].tolist(), q_cuts[1:].tolist(), strict=True):
        cuts = np.sort(rng.integers(0, num_k + 1, 2 * int(rng.integers(0, 4)))).tolist()
        rows += [(q0, q1, a, b, int(rng.integers(4))) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    order = rng.permutation(len(rows)).tolist()
    return Slices(tuple(rows[at] for at in order), num_q, num_k)


MASK_FAMILIES: dict[str, Callable[[int], Slices]] = {
    "full": _varlen(FULL, 1 << 40),
    "causal": _varlen(CAUSAL, 1 << 40),
    "inv_causal": _varlen(INVCAUSAL, 1 << 40),
    "bi_causal": _bi_causal,
    "varlen_full": _varlen(FULL, 41, 64, 1, 23),
    "varlen_causal": _varlen(CAUSAL, 70, 1, 32, 57),
    "prime_lengths": _varlen(CAUSAL, 2, 3, 5, 7, 11, 13, 17, 19, 23),
    "one_token_documents": _one_token_documents,
    "window": _window,
    "window_both_sides": _window_both_sides,
    "block_causal": _block_causal,
    "varlen_block_causal": _varlen_block_causal,
    "shared_prefix": _shared_prefix,
    "prefix_lm": _prefix_lm,
    "split_by_diagonal": _split_by_diagonal,
    "empty_rows": _empty_rows,
    "random_a": lambda n: random_slices(n, n, seed=1),
    "random_b": lambda n: random_slices(n, n, seed=2),
    "nothing": lambda n: _square([], n),
    "more_queries": _more_queries,
    "more_keys": _more_keys,
    "cross_documents": _cross_documents,
    "random_cross": lambda n: random_slices(n, n + n // 3, seed=3),
}

# Those in which queries and keys are the same tokens: what self-attention over several devices can be asked.
SELF_ATTENTION_FAMILIES = tuple(name for name, make in MASK_FAMILIES.items() if (s := make(64)).num_q == s.num_k)
