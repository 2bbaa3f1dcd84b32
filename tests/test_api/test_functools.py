"""Helpers around the keys. How windows are cut is tested with `mask.window`; here, what the public functions add to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magi_attention.api.functools import (
    apply_padding,
    compute_pad_size,
    infer_attn_mask_from_cu_seqlens,
    infer_attn_mask_from_sliding_window,
    infer_varlen_mask_from_batch,
    pad_at_dim,
    squash_batch_dim,
    unpad_at_dim,
)
from magi_attention.common import AttnRange, AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.mask import AttnMask

FULL, CAUSAL, INVCAUSAL, BICAUSAL = (AttnMaskType(name) for name in ("full", "causal", "inv_causal", "bi_causal"))


def dense_window(sq: int, sk: int, window: Sequence[int], num_global: int = 0) -> np.ndarray:
    """``[sq, sk]`` bool, as flash-attention words it, with the first queries of a sample of more queries than keys left out."""
    left, right = (sk if side == -1 else side for side in window)
    i, j = np.arange(sq)[:, None], np.arange(sk)[None, :]
    last = i + sk - sq + right
    near = (i + sk - sq - left <= j) & (j <= last)
    return (near | (j < np.minimum(num_global, last + 1))) & (i >= sq - sk)


def dense_samples(samples: list[np.ndarray]) -> np.ndarray:
    """Samples along the diagonal."""
    shape = sum(one.shape[0] for one in samples), sum(one.shape[1] for one in samples)
    whole, row, column = np.zeros(shape, bool), 0, 0
    for one in samples:
        whole[row : row + one.shape[0], column : column + one.shape[1]] = one
        row, column = row + one.shape[0], column + one.shape[1]
    return whole


def as_mask(q_ranges: AttnRanges, k_ranges: AttnRanges, types: list[AttnMaskType], num_q: int, num_k: int) -> AttnMask:
    """The mask of slices, checked to list each cell once."""
    assert isinstance(q_ranges, AttnRanges)
    assert isinstance(k_ranges, AttnRanges)
    assert all(isinstance(kind, AttnMaskType) for kind in types)
    mask = AttnMask.from_slices(q_ranges, k_ranges, types, num_q, num_k)
    mask.validate()
    return mask


class TestPadding:
    @pytest.mark.parametrize(
        ("total", "cp_size", "chunk_size", "expected"),
        [
            (1024, 6, 208, 224),
            (3840, 10, 128, 0),
            (13000, 17, 369, 5819),
            (1789, 2, 900, 11),
            (1, 1, 1, 0),
            (0, 4, 8, 0),
        ],
    )
    def test_compute_pad_size(self, total: int, cp_size: int, chunk_size: int, expected: int) -> None:
        assert compute_pad_size(total_seqlen_q=total, cp_size=cp_size, chunk_size=chunk_size) == expected

    @pytest.mark.parametrize("arguments", [(-1, 1, 1), (8, 0, 1), (8, 1, 0)])
    def test_compute_pad_size_of_what_is_none(self, arguments: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="at least 1, got"):
            compute_pad_size(*arguments)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
    def test_pad_then_unpad(self, dim: int, side: str, dtype: torch.dtype) -> None:
        x = torch.arange(24).reshape(2, 3, 4).to(dtype)
        padded = pad_at_dim(x, dim, 5, value=1, side=side)
        length = x.shape[dim]
        assert padded.dtype == dtype
        assert padded.shape[dim] == length + 5
        begin = 5 if side == "left" else 0
        assert torch.equal(padded.narrow(dim, begin, length), x)
        assert bool((padded.narrow(dim, 0 if side == "left" else length, 5) == 1).all())
        if side == "right":
            assert torch.equal(unpad_at_dim(padded, dim, 5), x)

    def test_differentiable(self) -> None:
        x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        (unpad_at_dim(pad_at_dim(x, 0, 4), 0, 5) * torch.tensor([[1.0], [2.0]])).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[1, 1], [2, 2], [0, 0]]

    def test_nothing_to_pad(self) -> None:
        x = torch.ones(3, 2)
        assert torch.equal(pad_at_dim(x, -1, 0), x)
        assert torch.equal(unpad_at_dim(x, -1, 0), x)
        assert unpad_at_dim(x, 0, 3).shape == (0, 2)

    def test_bad_arguments(self) -> None:
        x = torch.ones(3, 2)
        for dim in (2, -3):
            with pytest.raises(ValueError, match=rf"axis of x, in \[-2, 2\), got {dim}"):
                pad_at_dim(x, dim, 1)
            with pytest.raises(ValueError, match=rf"axis of x, in \[-2, 2\), got {dim}"):
                unpad_at_dim(x, dim, 1)
        with pytest.raises(ValueError, match="pad_size must be at least 0, got -1"):
            pad_at_dim(x, 0, -1)
        with pytest.raises(ValueError, match='side must be "left" or "right", got \'top\''):
            pad_at_dim(x, 0, 1, side="top")
        for size in (-1, 4):
            with pytest.raises(ValueError, match=rf"in \[0, 3\], the length of axis 0, got {size}"):
                unpad_at_dim(x, 0, size)

    def test_squash_batch_dim(self) -> None:
        x = torch.arange(24).reshape(2, 3, 4)
        assert torch.equal(squash_batch_dim(x), x.reshape(6, 4))
        assert squash_batch_dim(x.transpose(0, 1)).tolist() == x.transpose(0, 1).reshape(6, 4).tolist()
        assert squash_batch_dim(torch.ones(0, 3)).shape == (0,)
        with pytest.raises(ValueError, match=r"\[batch, seq, ...\], got shape \[5\]"):
            squash_batch_dim(torch.ones(5))


class TestApplyPadding:
    def test_appends_rows_that_attend_nothing(self) -> None:
        q, k = AttnRanges.from_ranges([(0, 12), (4, 20)]), AttnRanges.from_ranges([(0, 10), (10, 20)])
        types = [CAUSAL, BICAUSAL]
        padded_q, padded_k, padded_types = apply_padding(q, k, types, 31, 8)
        assert padded_q.to_naive_ranges() == [(0, 12), (4, 20), (31, 39)]
        assert padded_k.to_naive_ranges() == [(0, 10), (10, 20), (0, 0)]
        assert padded_types == [CAUSAL, BICAUSAL, FULL]
        plain = AttnMask.from_slices(q, k, types, 31, 20).to_dense()
        padded = AttnMask.from_slices(padded_q, padded_k, padded_types, 39, 20).to_dense()
        assert np.array_equal(padded[:31], plain)
        assert not padded[31:].any()

    def test_leaves_the_inputs_as_they_are(self) -> None:
        q, k, types = AttnRanges.from_ranges([(0, 12)]), AttnRanges.from_ranges([(0, 10)]), [CAUSAL]
        padded_q, _, _ = apply_padding(q, k, types, total_seqlen=12, pad_size=4)
        padded_q[0].end = 5
        assert (q.to_naive_ranges(), k.to_naive_ranges(), types) == ([(0, 12)], [(0, 10)], [CAUSAL])

    def test_takes_what_keys_take(self) -> None:
        q, k, types = apply_padding([[0, 4], [4, 8]], [[0, 4], [0, 8]], "causal", 8, 0)
        assert (q.to_naive_ranges()[-1], k.to_naive_ranges()[-1]) == ((8, 8), (0, 0))
        assert types == [CAUSAL, CAUSAL, FULL]
        assert apply_padding(AttnRanges(), AttnRanges(), [], 0, 3)[0].to_naive_ranges() == [(0, 3)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([(0, 4)], [(0, 4)], ["full"], 4, -1), "pad_size must be at least 0, got -1"),
            (([(0, 5)], [(0, 4)], ["full"], 4, 1), "within total_seqlen=4.*ends at 5"),
            (([(0, 4)], [], ["full"], 4, 1), "one q_range and one k_range a slice, got 1 and 0"),
            (([(0, 4)], [(0, 4)], ["full", "full"], 4, 1), "for each of the 1, got 2 types"),
            (([(0, 4)], [(0, 4)], ["casual"], 4, 1), '"full", "causal", "inv_causal", "bi_causal".*casual'),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            apply_padding(*arguments)


class TestBatch:
    def test_cu_seqlens_of_a_batch(self) -> None:
        for cu_seqlens in infer_varlen_mask_from_batch(batch_size=3, seq_len=5, device="cpu"):
            assert cu_seqlens.dtype == torch.int32
            assert cu_seqlens.tolist() == [0, 5, 10, 15]
        assert infer_varlen_mask_from_batch(0, 5, torch.device("cpu"))[0].tolist() == [0]
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert infer_varlen_mask_from_batch(2, 5)[1].device.type == expected

    def test_they_are_apart(self) -> None:
        q, k = infer_varlen_mask_from_batch(2, 5, "cpu")
        q[1] = 4
        assert k.tolist() == [0, 5, 10]

    @pytest.mark.parametrize(("batch_size", "seq_len"), [(-1, 5), (5, -1), (2**16, 2**16)])
    def test_bad_sizes(self, batch_size: int, seq_len: int) -> None:
        with pytest.raises(ValueError, match=f"got batch_size={batch_size}, seq_len={seq_len}"):
            infer_varlen_mask_from_batch(batch_size, seq_len, "cpu")


class TestSlidingWindow:
    @given(
        st.tuples(st.integers(0, 9), st.integers(0, 20)),
        st.tuples(st.integers(0, 9), st.integers(0, 20)),
        st.tuples(st.integers(-1, 25), st.integers(-1, 25)),
    )
    def test_against_the_definition(self, q: tuple[int, int], k: tuple[int, int], window: tuple[int, int]) -> None:
        (q0, sq), (k0, sk) = q, k
        slices = infer_attn_mask_from_sliding_window(AttnRange(q0, q0 + sq), AttnRange(k0, k0 + sk), window)
        dense = as_mask(*slices, num_q=30, num_k=30).to_dense()
        wanted = np.zeros((30, 30), bool)
        wanted[q0 : q0 + sq, k0 : k0 + sk] = dense_window(sq, sk, window)
        assert np.array_equal(dense, wanted)
        assert len(slices[2]) <= 3

    def test_slices_by_hand(self) -> None:
        q, k, types = infer_attn_mask_from_sliding_window(q_range=[5, 15], k_range=(5, 15), window_size=[2, 3])
        assert q.to_naive_ranges() == [(5, 7), (7, 12), (12, 15)]
        assert k.to_naive_ranges() == [(5, 10), (5, 15), (10, 15)]
        assert types == [CAUSAL, BICAUSAL, INVCAUSAL]

    def test_one_slice_where_one_will_do(self) -> None:
        ten, twenty = AttnRange(0, 10), AttnRange(30, 50)
        for window, kind in (
            ((-1, -1), FULL),
            ((-1, 0), CAUSAL),
            ((0, -1), INVCAUSAL),
            ((0, 0), BICAUSAL),
            ((9, 9), FULL),
        ):
            assert infer_attn_mask_from_sliding_window(ten, ten, window)[2] == [kind]
        assert infer_attn_mask_from_sliding_window(ten, twenty, (4, 0))[2] == [BICAUSAL]

    def test_of_more_queries_than_keys_the_first_see_nothing(self) -> None:
        for window in ((-1, -1), (3, 3), (-1, 0)):
            q, _, _ = infer_attn_mask_from_sliding_window([0, 20], [0, 10], window)
            assert (q.start, q.end) == (10, 20)
        assert infer_attn_mask_from_sliding_window([0, 20], [5, 5], (1, 1))[2] == []

    def test_the_ranges_given_are_left_as_they_are(self) -> None:
        one = AttnRange(5, 15)
        q, _, _ = infer_attn_mask_from_sliding_window(one, one, (-1, 0))
        q[0].end = 7
        assert one == AttnRange(5, 15)

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="window_size must be two ints"):
            infer_attn_mask_from_sliding_window([0, 5], [0, 5], (-2, 0))
        with pytest.raises(ValueError, match="start <= end"):
            infer_attn_mask_from_sliding_window([5, 0], [0, 5], (1, 0))


class TestCuSeqlens:
    @given(
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5),
        st.tuples(st.integers(-1, 14), st.integers(-1, 14)),
        st.integers(0, 14),
    )
    def test_against_the_definition(
        self, sizes: list[tuple[int, int]], window: tuple[int, int], num_global: int
    ) -> None:
        ends = np.cumsum([(0, 0), *sizes], axis=0)
        *slices, total_q, total_k = infer_attn_mask_from_cu_seqlens(
            ends[:, 0].tolist(), ends[:, 1].tolist(), window_size=window, global_window_size=num_global
        )
        assert (total_q, total_k) == tuple(ends[-1].tolist())
        is_open = window == (-1, -1)
        samples = [np.ones(size, bool) if is_open else dense_window(*size, window, num_global) for size in sizes]
        assert np.array_equal(as_mask(*slices, total_q, total_k).to_dense(), dense_samples(samples))

    @given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5), st.integers(0, 3))
    def test_causal(self, sizes: list[tuple[int, int]], num_global: int) -> None:
        ends = np.cumsum([(0, 0), *sizes], axis=0)
        *slices, total_q, total_k = infer_attn_mask_from_cu_seqlens(
            ends[:, 0].tolist(), ends[:, 1].tolist(), causal=True, global_window_size=num_global
        )
        samples = [np.tri(sq, sk, sk - sq, dtype=bool) for sq, sk in sizes]
        assert np.array_equal(as_mask(*slices, total_q, total_k).to_dense(), dense_samples(samples))

    def test_without_a_window_one_slice_a_sample(self) -> None:
        for causal, kind in ((False, FULL), (True, CAUSAL)):
            q, k, types, total_q, total_k = infer_attn_mask_from_cu_seqlens(
                [0, 5, 5, 20], [0, 3, 8, 9], causal, (-1, -1), 2
            )
            assert q.to_naive_ranges() == [(0, 5), (5, 5), (5, 20)]
            assert k.to_naive_ranges() == [(0, 3), (3, 8), (8, 9)]
            assert types == [kind] * 3
            assert (total_q, total_k) == (20, 9)

    def test_a_window_written_as_causal_is_causal(self) -> None:
        by_flag = infer_attn_mask_from_cu_seqlens([0, 5, 20], [0, 5, 20], causal=True)
        assert infer_attn_mask_from_cu_seqlens([0, 5, 20], [0, 5, 20], window_size=(-1, 0)) == by_flag

    @pytest.mark.parametrize(
        "make", [list, tuple, np.array, torch.tensor, lambda ends: torch.tensor(ends, dtype=torch.int32)]
    )
    def test_what_cumulative_lengths_may_be(self, make: Any) -> None:
        found = infer_attn_mask_from_cu_seqlens(make([0, 5, 20]), make([0, 5, 20]), window_size=[2, 0])
        assert found == infer_attn_mask_from_cu_seqlens([0, 5, 20], [0, 5, 20], window_size=(2, 0))
        assert type(found[3]) is int

    def test_no_samples(self) -> None:
        for window in ((-1, -1), (2, 0)):
            assert infer_attn_mask_from_cu_seqlens([0], [0], window_size=window) == (
                AttnRanges(),
                AttnRanges(),
                [],
                0,
                0,
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([1, 5], [0, 5]), "cu_seqlens_q must be cumulative lengths in tokens: .* starts at 0"),
            (([0, 5], [0, 5, 3]), "cu_seqlens_k must be cumulative lengths in tokens: .* never descends"),
            (([], [0]), "cu_seqlens_q must be cumulative lengths"),
            (([0, 2.5], [0, 5]), "cu_seqlens_q must be .* ints"),
            (([[0, 5]], [0, 5]), "cu_seqlens_q must be .* one axis"),
            (([0, 5], [0, 5, 6]), "equally many samples, got 1 and 2"),
            (([0, 5], [0, 5], True, (3, 0)), r"causal=True and window_size=\(3, 0\) exclude each other"),
            (([0, 5], [0, 5], True, (-1, 0)), r"causal=True and window_size=\(-1, 0\) exclude each other"),
            (([0, 5], [0, 5], False, (3,)), "window_size must be two ints"),
            (([0, 5], [0, 5], False, (3, 0), -1), "global_window_size must be an int of 0 or more, got -1"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            infer_attn_mask_from_cu_seqlens(*arguments)

    def test_ten_thousand_documents(self) -> None:
        lengths = np.random.default_rng(0).integers(1, 2000, 10_000)
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        began = time.perf_counter()
        q, _, _, total, _ = infer_attn_mask_from_cu_seqlens(ends, ends, window_size=(512, 64), global_window_size=16)
        # Some 0.1 s; a busy machine may take more.
        assert time.perf_counter() - began < 5
        assert total == lengths.sum()
        assert len(q) > 10_000
