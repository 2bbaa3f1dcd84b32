"""Each family attends exactly the cells that its sentence says, in as few rows as its docstring promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mask_cases import CASES, FAMILIES, any_mask, random_edges, random_spans, random_tree, random_window

from magi_attention.mask import AttnMask

Rng = np.random.Generator
Cell = Callable[[int, int], bool]


def assert_attends(mask: AttnMask, attends: Cell, what: Any) -> None:
    mask.validate()
    expected = np.array([[attends(i, j) for j in range(mask.num_k)] for i in range(mask.num_q)], dtype=bool)
    np.testing.assert_array_equal(mask.to_dense(), expected.reshape(mask.num_q, mask.num_k), err_msg=str(what))


def documents(edges: list[int]) -> list[int]:
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges)).tolist()


def check_sliding_window(rng: Rng, n: int) -> None:
    num_k, num_global, (left, right) = int(rng.integers(0, 20)), int(rng.integers(0, 4)), random_window(rng)
    global_queries = bool(rng.integers(2))
    mask = AttnMask.sliding_window(n, (left, right), num_k, num_global=num_global, global_queries=global_queries)
    offset = num_k - n

    def attends(i: int, j: int) -> bool:
        if global_queries and (i < num_global or j < num_global):
            return True
        at = i + offset
        in_window = (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
        # More queries than keys: the first see nothing.
        return at >= 0 and (in_window or (j < num_global and (right < 0 or j <= at + right)))

    assert_attends(mask, attends, (n, num_k, left, right, num_global, global_queries))
    assert len(mask.bands) <= (3 if global_queries else 2 if num_global else 1)


def check_varlen(rng: Rng, n: int) -> None:
    edges, causal = random_edges(rng, n), bool(rng.integers(2))
    document = documents(edges)
    mask = AttnMask.varlen(edges, causal=causal)
    assert_attends(mask, lambda i, j: document[i] == document[j] and (j <= i or not causal), edges)
    assert len(mask.bands) <= len(edges) - 1


def check_cross_attention(rng: Rng, n: int) -> None:
    edges_q, edges_k = random_edges(rng, n), random_edges(rng, n + 3)
    edges_q = (edges_q + [n] * len(edges_k))[: len(edges_k)]
    edges_q[-1] = n
    document_q, document_k = documents(edges_q), documents(edges_k)
    mask = AttnMask.cross_attention(edges_q, edges_k)
    assert_attends(mask, lambda i, j: document_q[i] == document_k[j], (edges_q, edges_k))


def check_block_causal(rng: Rng, n: int) -> None:
    edges, size = random_edges(rng, n), int(rng.integers(1, 6))
    num_blocks = None if rng.integers(2) else int(rng.integers(1, 4))
    document = documents(edges)

    def attends(i: int, j: int) -> bool:
        block_q, block_k = ((at - edges[document[i]]) // size for at in (i, j))
        return document[i] == document[j] and block_k <= block_q and (not num_blocks or block_q - block_k < num_blocks)

    mask = AttnMask.varlen_block_causal(edges, size, num_blocks=num_blocks)
    assert_attends(mask, attends, (edges, size, num_blocks))
    assert len(mask.bands) == sum(-(-length // size) for length in np.diff(edges).tolist())


def check_chunked_causal(rng: Rng, n: int) -> None:
    edges, size = random_edges(rng, n), int(rng.integers(1, 8))
    document = documents(edges)

    def attends(i: int, j: int) -> bool:
        start = edges[document[i]]
        return document[i] == document[j] and (i - start) // size == (j - start) // size and j <= i

    assert_attends(AttnMask.chunked_causal(n, size, edges), attends, (edges, size))


def check_dilated_blocks(rng: Rng, n: int) -> None:
    size, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    most, causal = (None if rng.integers(2) else int(rng.integers(1, 4))), bool(rng.integers(2))

    def attends(i: int, j: int) -> bool:
        apart = i // size - j // size
        in_reach = apart % dilation == 0 and (most is None or abs(apart) // dilation < most)
        return in_reach and (j <= i or not causal)

    mask = AttnMask.dilated_blocks(n, size, dilation, num_blocks=most, causal=causal)
    assert_attends(mask, attends, (n, size, dilation, most, causal))


def check_strided_blocks(rng: Rng, n: int) -> None:
    size, stride = int(rng.integers(1, 5)), int(rng.integers(1, 4))

    def attends(i: int, j: int) -> bool:
        return j <= i and (i // size == j // size or j // size % stride == stride - 1)

    assert_attends(AttnMask.strided_blocks(n, size, stride), attends, (n, size, stride))


def check_prefix_lm(rng: Rng, n: int) -> None:
    edges = random_edges(rng, n)
    document = documents(edges)
    prefixes = [int(rng.integers(0, length + 1)) for length in np.diff(edges).tolist()]

    def attends(i: int, j: int) -> bool:
        return document[i] == document[j] and (j <= i or j < edges[document[i]] + prefixes[document[i]])

    mask = AttnMask.varlen_prefix_lm(edges, prefixes)
    assert_attends(mask, attends, (edges, prefixes))
    assert len(mask.bands) <= 2 * (len(edges) - 1)


def check_shared_prefix(rng: Rng, n: int) -> None:
    lengths, parents = random_tree(rng)
    text = np.repeat(np.arange(len(lengths)), lengths).tolist()

    def attends(i: int, j: int) -> bool:
        above = parents[text[i]]
        while above >= 0:
            if above == text[j]:
                return True
            above = parents[above]
        return text[i] == text[j] and j <= i

    assert_attends(AttnMask.shared_prefix(lengths, parents), attends, (lengths, parents))


def check_multimodal(rng: Rng, n: int) -> None:
    spans = random_spans(rng, n)

    def attends(i: int, j: int) -> bool:
        return j <= i or any(start <= i < end and start <= j < end for start, end in spans)

    mask = AttnMask.multimodal(n, spans)
    assert_attends(mask, attends, spans)
    assert len(mask.bands) <= 1 + len(spans)


CHECKS = [
    check_sliding_window,
    check_varlen,
    check_cross_attention,
    check_block_causal,
    check_chunked_causal,
    check_dilated_blocks,
    check_strided_blocks,
    check_prefix_lm,
    check_shared_prefix,
    check_multimodal,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_a_family_attends_what_it_says(check: Callable[[Rng, int], None]) -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        check(rng, int(rng.integers(1, 18)))


@pytest.mark.parametrize("num_cases", CASES)
def test_combinators_do_to_cells_what_they_say(num_cases: int) -> None:
    rng = np.random.default_rng(7)
    for _ in range(num_cases):
        mask = any_mask(rng)
        dense, (n, m) = mask.to_dense(), (mask.num_q, mask.num_k)
        other = AttnMask(FAMILIES["random"](rng, n).bands, n, max(m, 20)).restrict(k_ranges=(0, m))
        other = other.shift(0, 0, n, m)
        both = mask.intersection(other)
        both.validate()
        np.testing.assert_array_equal(both.to_dense(), dense & other.to_dense())
        assert mask.attends_same(other) == bool((dense == other.to_dense()).all())

        q_cut, k_cut = random_spans(rng, n), random_spans(rng, m)
        inside = np.zeros_like(dense)
        for q0, q1 in q_cut:
            for k0, k1 in k_cut:
                inside[q0:q1, k0:k1] = True
        np.testing.assert_array_equal(mask.restrict(q_cut, k_cut).to_dense(), dense & inside)

        split = int(rng.integers(0, n + 1))
        halves = [mask.restrict(pair) for pair in ((0, split), (split, n))]
        assert halves[0].union(halves[1]).attends_same(mask)
        np.testing.assert_array_equal(mask.transpose().to_dense(), dense.T)

        down, right = rng.integers(-9, 9, 2).tolist()
        moved = np.zeros((n + 9, m + 9), bool)
        at_q, at_k = np.nonzero(dense)
        kept = (at_q + down >= 0) & (at_k + right >= 0)
        moved[at_q[kept] + down, at_k[kept] + right] = True
        np.testing.assert_array_equal(mask.shift(down, right, n + 9, m + 9).to_dense(), moved)

        packed = np.zeros((2 * n, 2 * m), bool)
        packed[:n, :m], packed[n:, m:] = dense, other.to_dense()
        np.testing.assert_array_equal(mask.concat(other).to_dense(), packed)


def test_rows_do_not_grow_with_tokens() -> None:
    million = 1 << 20
    assert len(AttnMask.sliding_window(million, (4096, 0)).bands) == 1
    assert len(AttnMask.prefix_lm(million, 1000).bands) == 2
    assert len(AttnMask.chunked_causal(100_000, 8192).bands) == 13
    assert len(AttnMask.shared_prefix([1000] * 65, [-1] + [0] * 64).bands) == 66
    assert len(AttnMask.dilated_blocks(1000, 1, 100).bands) == 10


def test_cells_are_counted_exactly_up_to_the_longest_mask() -> None:
    longest = (1 << 31) - 1
    full, causal = AttnMask.full(longest), AttnMask.causal(longest)
    assert full.area == longest**2
    assert causal.area == longest * (longest + 1) // 2
    above = AttnMask(np.array([[0, longest - 1, 1, longest, 1, longest - 1]]), longest, longest)
    assert causal.union(above).simplify() == full
    assert causal.intersection(full).attends_same(causal)
    window = AttnMask.sliding_window(longest, (4096, 0))
    assert window.area == 4097 * longest - 4096 * 4097 // 2
    assert AttnMask.from_slices(*window.to_slices()).simplify() == window
    assert AttnMask.causal(longest, longest - 1).area == longest * (longest - 1) // 2


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: AttnMask.varlen([0, 5, 3]), "never descend"),
        (lambda: AttnMask.varlen([1, 5]), "starts at 0"),
        (lambda: AttnMask.varlen([0.0, 5.0]), "ints"),
        (lambda: AttnMask.varlen([0, 5], [0, 2, 5]), "equally many documents"),
        (lambda: AttnMask.varlen([0, 5], causal=True, window_size=(2, 0)), "window_size=\\(w - 1, 0\\)"),
        (lambda: AttnMask.sliding_window(5, (1, -2)), "window_size must be two ints"),
        (lambda: AttnMask.sliding_window(5, 3), "window_size must be two ints \\(left, right\\).*got 3"),
        (lambda: AttnMask.multimodal(8, [(0.5, 2)]), "image_spans must be pairs of ints"),
        (lambda: AttnMask.full(1 << 31), "num_q must be at most 2,147,483,647.*got 2,147,483,648"),
        (lambda: AttnMask.full(-1), "num_q must be an int of 0 or more"),
        (lambda: AttnMask.block_causal(8, 0), "block_size must be an int of 1 or more"),
        (lambda: AttnMask.chunked_causal(8, 2, [0, 7]), "must end at num_tokens"),
        (lambda: AttnMask.prefix_lm(4, 5), "none longer than its document"),
        (lambda: AttnMask.shared_prefix([2, 2], [0, 0]), "an earlier text"),
        (lambda: AttnMask.shared_prefix([2, -2], [-1, 0]), "must not be negative"),
        (lambda: AttnMask.multimodal(8, [(1, 4), (3, 5)]), "disjoint"),
        (lambda: AttnMask.multimodal(8, [(3, 5)], [0, 4, 8]), "crosses a border"),
        (lambda: AttnMask.causal(4).union(AttnMask.full(4)), "is attended by two of them"),
        (lambda: AttnMask.causal(4).union(AttnMask.full(5)), "same lengths"),
        (lambda: AttnMask.causal(4).restrict([(2, 4), (0, 3)]), "disjoint ascending"),
    ],
)
def test_mistakes_are_told(build: Callable[[], AttnMask], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build()
