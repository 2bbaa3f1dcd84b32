"""Random masks for tests: small, awkward, and every family of the builders among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from magi_attention.mask import AttnMask

Rng = np.random.Generator

# A few hundred cases in every run, 10,000 in the long one.
CASES = [
    pytest.param(300, id="300"),
    pytest.param(10_000, id="10000", marks=pytest.mark.long),
]


def random_edges(rng: Rng, num_tokens: int, most: int = 6) -> list[int]:
    """``cu_seqlens`` of up to ``most`` documents, empty ones among them."""
    cuts = rng.integers(0, num_tokens + 1, int(rng.integers(0, most)))
    return [0, *sorted(cuts.tolist()), num_tokens]


def random_spans(rng: Rng, num_tokens: int) -> list[tuple[int, int]]:
    cuts = sorted(rng.integers(0, num_tokens + 1, 2 * int(rng.integers(0, 4))).tolist())
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def random_tree(rng: Rng) -> tuple[list[int], list[int]]:
    count = int(rng.integers(1, 8))
    return rng.integers(0, 5, count).tolist(), [int(rng.integers(-1, text)) for text in range(count)]


def random_window(rng: Rng) -> tuple[int, int]:
    left, right = rng.integers(-1, 7, 2).tolist()
    return left, right


FAMILIES: dict[str, Callable[[Rng, int], AttnMask]] = {
    "full": lambda rng, n: AttnMask.full(n, int(rng.integers(0, 20))),
    "causal": lambda rng, n: AttnMask.causal(n, int(rng.integers(0, 20))),
    "varlen": lambda rng, n: AttnMask.varlen(random_edges(rng, n), causal=bool(rng.integers(2))),
    "varlen_window": lambda rng, n: AttnMask.varlen(random_edges(rng, n), window_size=random_window(rng)),
    "sliding_window": lambda rng, n: AttnMask.sliding_window(
        n, random_window(rng), num_global=int(rng.integers(0, 4)), global_queries=bool(rng.integers(2))
    ),
    "block_causal": lambda rng, n: AttnMask.block_causal(n, int(rng.integers(1, 6))),
    "varlen_block_causal": lambda rng, n: AttnMask.varlen_block_causal(random_edges(rng, n), int(rng.integers(1, 6))),
    "chunked_causal": lambda rng, n: AttnMask.chunked_causal(n, int(rng.integers(1, 8))),
    "dilated_blocks": lambda rng, n: AttnMask.dilated_blocks(n, int(rng.integers(1, 4)), int(rng.integers(1, 4))),
    "strided_blocks": lambda rng, n: AttnMask.strided_blocks(n, int(rng.integers(1, 5)), int(rng.integers(1, 4))),
    "prefix_lm": lambda rng, n: AttnMask.prefix_lm(n, int(rng.integers(0, n + 1))),
    "shared_prefix": lambda rng, n: AttnMask.shared_prefix(*random_tree(rng)),
    "multimodal": lambda rng, n: AttnMask.multimodal(n, random_spans(rng, n)),
    "concat": lambda rng, n: AttnMask.causal(n).concat(AttnMask.full(3, 2), AttnMask.causal(2, 4)),
    "pieces": lambda rng, n: in_pieces(rng, AttnMask.prefix_lm(n, n // 2)),
    "random": lambda rng, n: random_mask(rng, n, int(rng.integers(0, 20))),
}


def random_mask(rng: Rng, num_q: int, num_k: int) -> AttnMask:
    """Disjoint slices of random types, in random order: each row of a cutting of the queries has some."""
    q_ranges, k_ranges, types = [], [], []
    q_cuts = random_edges(rng, num_q)
    for q0, q1 in zip(q_cuts[:-1], q_cuts[1:], strict=True):
        for k0, k1 in random_spans(rng, num_k):
            q_ranges.append((q0, q1))
            k_ranges.append((k0, k1))
            types.append(int(rng.integers(4)))
    order = rng.permutation(len(types))
    chosen = [[values[at] for at in order] for values in (q_ranges, k_ranges, types)]
    return AttnMask.from_slices(*chosen, num_q=num_q, num_k=num_k)


def in_pieces(rng: Rng, mask: AttnMask) -> AttnMask:
    """The same cells, cut at random queries and keys into more rows, shuffled."""
    from magi_attention.mask.bands import split_k, split_q

    q_cuts, k_cuts = (np.unique(random_edges(rng, n, 9)) for n in (mask.num_q, mask.num_k))
    bands = split_q(mask.bands, q_cuts[:-1], q_cuts[1:])[0]
    bands = split_k(bands, k_cuts[:-1], k_cuts[1:])[0]
    return AttnMask(rng.permutation(bands), mask.num_q, mask.num_k)


def any_mask(rng: Rng) -> AttnMask:
    """A mask of any family, of 1 to 24 tokens."""
    name = list(FAMILIES)[int(rng.integers(len(FAMILIES)))]
    return FAMILIES[name](rng, int(rng.integers(1, 25)))
