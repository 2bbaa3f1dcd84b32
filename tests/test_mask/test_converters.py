"""Every way in and out, exact against the dense mask."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mask_cases import CASES, any_mask, in_pieces, random_edges

from magi_attention.mask import AttnMask
from magi_attention.mask.cells import equal_runs

Rng = np.random.Generator


def random_dense(rng: Rng, most: int = 20) -> np.ndarray:
    """A matrix of any kind: of a mask, of one that was disturbed, of noise."""
    kind = int(rng.integers(3))
    if kind == 0:
        return rng.random(rng.integers(0, most, 2)) < rng.random()
    dense = any_mask(rng).to_dense()
    return dense ^ (rng.random(dense.shape) < 0.1) if kind == 1 else dense


@pytest.mark.parametrize("num_cases", CASES)
def test_dense_there_and_back(num_cases: int) -> None:
    rng = np.random.default_rng(21)
    for _ in range(num_cases):
        dense = random_dense(rng)
        mask = AttnMask.from_dense(dense)
        mask.validate()
        np.testing.assert_array_equal(mask.to_dense(), dense)
        most = merged_runs(dense)
        assert len(equal_runs(dense)) == most
        assert len(mask.bands) <= most
        assert len(mask.to_slices()[2]) <= most


def merged_runs(dense: np.ndarray) -> int:
    """How many slices merging equal runs of adjacent rows gives, the plain way."""
    count, above = 0, set()
    for line in dense.tolist():
        runs, start = set(), None
        for at, cell in enumerate([*line, False]):
            if cell and start is None:
                start = at
            elif not cell and start is not None:
                runs.add((start, at))
                start = None
        count += len(runs - above)
        above = runs
    return count


@pytest.mark.parametrize("num_cases", CASES)
def test_a_row_comes_back_from_dense_as_one_row(num_cases: int) -> None:
    rng = np.random.default_rng(22)
    for _ in range(num_cases):
        n, m = rng.integers(1, 20, 2).tolist()
        window = AttnMask.sliding_window(n, tuple(rng.integers(-1, 9, 2).tolist()), m)
        row = window.shift(*rng.integers(0, 4, 2).tolist())
        assert AttnMask.from_dense(row.to_dense()) == row


def test_few_rows_of_named_families() -> None:
    for mask in (
        AttnMask.varlen([0, 100, 150, 400], causal=True),
        AttnMask.varlen([0, 100, 150, 400], window_size=(30, 0)),
        AttnMask.block_causal(400, 50),
        AttnMask.prefix_lm(300, 100),
        AttnMask.shared_prefix([50, 60, 70], [-1, 0, 0]),
        AttnMask.multimodal(300, [(20, 80), (100, 160)]),
        AttnMask.chunked_causal(500, 64),
        AttnMask.sliding_window(500, (20, 20)),
        AttnMask.dilated_blocks(200, 1, 20),
    ):
        assert len(AttnMask.from_dense(mask.to_dense()).bands) <= len(mask.bands)


@pytest.mark.parametrize("num_cases", CASES)
def test_document_ids(num_cases: int) -> None:
    rng = np.random.default_rng(23)
    for _ in range(num_cases):
        n, causal = int(rng.integers(0, 20)), bool(rng.integers(2))
        ids = rng.integers(-1, 4, n)
        if rng.integers(2):
            ids = np.sort(ids)
        mask = AttnMask.from_document_ids(ids, causal=causal, padding_id=-1)
        mask.validate()
        expected = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
        expected &= np.tri(n, dtype=bool) if causal else True
        np.testing.assert_array_equal(mask.to_dense(), expected)


@pytest.mark.parametrize("num_cases", CASES)
def test_position_ids(num_cases: int) -> None:
    rng = np.random.default_rng(24)
    for _ in range(num_cases):
        edges = random_edges(rng, int(rng.integers(0, 20)))
        positions = np.concatenate([np.arange(length) for length in np.diff(edges)])
        causal = bool(rng.integers(2))
        mask = AttnMask.from_position_ids(torch.from_numpy(positions.astype(np.int64)), causal=causal)
        assert mask == AttnMask.varlen(edges, causal=causal)
        if len(positions) > 1:
            positions[int(rng.integers(1, len(positions)))] = 50
            with pytest.raises(ValueError, match="count up by one"):
                AttnMask.from_position_ids(positions)


@pytest.mark.parametrize("num_cases", CASES)
def test_attention_mask_of_a_tokenizer(num_cases: int) -> None:
    rng = np.random.default_rng(25)
    for _ in range(num_cases):
        batch, length = rng.integers(1, 5, 2).tolist()
        padding = rng.random((batch, length)) < 0.7
        causal = bool(rng.integers(2))
        mask = AttnMask.from_attention_mask(torch.from_numpy(padding.astype(np.int64)), causal=causal)
        expected = np.zeros((batch, length, batch, length), bool)
        for sample in range(batch):
            one = padding[sample][:, None] & padding[sample][None, :]
            expected[sample, :, sample, :] = one & np.tri(length, dtype=bool) if causal else one
        np.testing.assert_array_equal(mask.to_dense(), expected.reshape(batch * length, -1))


@pytest.mark.parametrize("num_cases", CASES)
def test_column_bounds(num_cases: int) -> None:
    rng = np.random.default_rng(26)
    for _ in range(num_cases):
        num_k, num_q = rng.integers(0, 16, 2).tolist()
        causal = bool(rng.integers(2))
        width = int(rng.choice([1, 2] if causal else [2, 4]))
        bounds = rng.integers(0, num_q + 2, (num_k, width))
        kind = int(rng.integers(4))
        if kind == 1:
            bounds = np.sort(bounds, axis=0)
        elif kind > 1 and num_k:  # level or slanting over several keys
            length = int(rng.integers(1, 9))
            at = np.arange(num_k)
            bounds = bounds[at // length] + (at % length)[:, None] * rng.integers(0, 2, width)
        expected = np.ones((num_q, num_k), bool)
        for j in range(num_k):
            c = bounds[j].tolist()
            if width == 1:
                hidden = [(c[0], num_q)]
            elif width == 2:
                hidden = [(c[0], c[1])] if causal else [(c[0], num_q), (0, c[1])]
            else:
                hidden = [(c[0], c[1]), (c[2], c[3])]
            for start, end in hidden:
                expected[start:end, j] = False
            if causal:
                expected[: max(j + num_q - num_k, 0), j] = False
        mask = AttnMask.from_startend_row_indices(torch.from_numpy(bounds), num_q, causal=causal)
        mask.validate()
        np.testing.assert_array_equal(mask.to_dense(), expected, err_msg=f"{bounds.tolist()} {causal}")


def test_column_bounds_of_documents_are_a_row_a_document() -> None:
    edges = np.array([0, 30_000, 30_001, 70_000, 100_000])
    ends = np.repeat(edges[1:], np.diff(edges))
    mask = AttnMask.from_startend_row_indices(ends[:, None], causal=True)
    assert mask.attends_same(AttnMask.varlen(edges, causal=True))
    assert len(mask.bands) == 4


def test_column_bounds_of_windows_are_a_row() -> None:
    n = 100_000
    key = np.arange(n)
    until = np.minimum(key + 512, n)
    for bounds, causal, expected in (
        (until[:, None], True, AttnMask.sliding_window(n, (511, 0))),
        (np.stack([until, np.maximum(key - 9, 0)], axis=1), False, AttnMask.sliding_window(n, (511, 9))),
        (np.stack([key + 1000, np.full(n, n)], axis=1), True, AttnMask.sliding_window(n, (999, 0))),
    ):
        assert AttnMask.from_startend_row_indices(bounds, causal=causal) == expected


@pytest.mark.parametrize("num_cases", CASES)
def test_cu_seqlens_there_and_back(num_cases: int) -> None:
    rng = np.random.default_rng(27)
    for _ in range(num_cases):
        edges_q, edges_k = random_edges(rng, int(rng.integers(0, 20))), random_edges(rng, int(rng.integers(0, 20)))
        if rng.integers(2):
            edges_k = edges_q
        last = min(len(edges_q), len(edges_k))
        edges_q, edges_k = edges_q[:last], edges_k[:last]
        mask = in_pieces(rng, AttnMask.varlen(edges_q, edges_k, causal=bool(rng.integers(2))))
        cu_q, cu_k, causal = mask.to_cu_seqlens()
        assert AttnMask.varlen(cu_q, cu_k, causal=causal).attends_same(mask)


@pytest.mark.parametrize("num_cases", CASES)
def test_cu_seqlens_only_where_they_can_tell(num_cases: int) -> None:
    rng = np.random.default_rng(28)
    told = 0
    for _ in range(num_cases):
        mask = any_mask(rng)
        try:
            cu_q, cu_k, causal = mask.to_cu_seqlens()
        except ValueError as error:
            assert "cu_seqlens cannot tell" in str(error)  # noqa: PT017
            continue
        told += 1
        assert AttnMask.varlen(cu_q, cu_k, causal=causal).attends_same(mask)
    assert 0 < told < num_cases


def test_cu_seqlens_of_documents_are_the_documents() -> None:
    edges = [0, 4, 9, 10]
    cu_q, cu_k, causal = AttnMask.varlen(edges, causal=True).to_cu_seqlens()
    assert (cu_q.tolist(), cu_k.tolist(), causal) == (edges, edges, True)
    cu_q, cu_k, causal = AttnMask.varlen(edges).to_cu_seqlens()
    assert (cu_q.tolist(), cu_k.tolist(), causal) == (edges, edges, False)


@pytest.mark.parametrize("num_cases", CASES)
def test_slices_there_and_back(num_cases: int) -> None:
    rng = np.random.default_rng(29)
    for _ in range(num_cases):
        mask = any_mask(rng)
        again = AttnMask.from_slices(*mask.to_slices(), num_q=mask.num_q, num_k=mask.num_k)
        again.validate()
        np.testing.assert_array_equal(again.to_dense(), mask.to_dense())


@pytest.mark.parametrize("num_cases", CASES)
def test_json_there_and_back(num_cases: int) -> None:
    rng = np.random.default_rng(30)
    for _ in range(num_cases):
        mask = any_mask(rng)
        assert AttnMask.from_json(mask.to_json()) == mask
    assert json.loads(AttnMask.causal(2).to_json())["rows"] == [[0, 2, 0, 2, -1, 0]]


def test_slices_as_programs_hold_them() -> None:
    mask = AttnMask.sliding_window(20, (5, 0))
    q_ranges, k_ranges, types = mask.to_slices()
    tensors = [torch.as_tensor(part, dtype=torch.int32) for part in (q_ranges, k_ranges, types)]
    names = [("full", "causal", "inv_causal", "bi_causal")[kind] for kind in types]
    for given in (tensors, (q_ranges, k_ranges, list(types)), (q_ranges.tolist(), k_ranges.tolist(), names)):
        assert AttnMask.from_slices(*given).attends_same(mask)


def test_packed_batches_of_one() -> None:
    assert AttnMask.from_position_ids(torch.tensor([[0, 1, 2, 0]])) == AttnMask.varlen([0, 3, 4], causal=True)
    assert AttnMask.from_document_ids(torch.tensor([[7, 7, 7, 5]])) == AttnMask.from_cu_seqlens([0, 3, 4], causal=True)


def test_dense_as_programs_hold_it() -> None:
    dense = torch.ones(1, 1, 4, 6).tril()
    assert AttnMask.from_dense(dense).attends_same(AttnMask.from_dense(dense[0, 0].bool().numpy()))
    assert AttnMask.from_dense(np.zeros((0, 3), bool)).num_k == 3


@pytest.mark.parametrize(
    ("convert", "complaint"),
    [
        (lambda: AttnMask.from_dense(torch.randn(3, 3)), "must be \\[num_q, num_k\\] of booleans"),
        (lambda: AttnMask.from_dense(torch.ones(2, 3, 3)), "one mask for each"),
        (lambda: AttnMask.from_position_ids([3, 4, 0, 1]), "position_ids\\[0\\] is 3"),
        (lambda: AttnMask.from_position_ids([0, 1, 3]), "position_ids\\[2\\] is 3 behind 1"),
        (lambda: AttnMask.from_document_ids([[0, 1], [0, 1]]), "one axis of ints"),
        (lambda: AttnMask.from_position_ids([[0, 1], [0, 1]]), "one axis of ints, got shape \\[2, 2\\]"),
        (lambda: AttnMask.from_dense(torch.zeros(3, 3).fill_(-1e9).triu(1)), "give `dense == 0`"),
        (lambda: AttnMask.from_slices([(0, 4.5)], [(0, 4)]), "pairs of ints"),
        (lambda: AttnMask.from_slices([(0, 4)], [(0, 4, 5)]), "shape \\[1, 3\\]"),
        (lambda: AttnMask.from_slices([(4, 0)], [(0, 4)]), "<= end <= 4, got \\[4, 0\\)"),
        (lambda: AttnMask.from_slices([(0, 4)], [(0, 4)], torch.tensor([4])), "got 4"),
        (lambda: AttnMask.from_slices([(0, 4)], [(0, 4)], torch.tensor([0.0])), "attn_mask_type must be one axis"),
        (lambda: AttnMask.from_slices([(0, 4)], [(0, 4)], ["casual"]), "got 'casual'"),
        (lambda: AttnMask.from_attention_mask([[0, 2]]), "use from_document_ids"),
        (lambda: AttnMask.from_startend_row_indices(np.zeros((4, 4), int), causal=True), "with causal=True"),
        (lambda: AttnMask.from_startend_row_indices(np.zeros((2, 8, 4, 4), int)), "one mask for each"),
        (lambda: AttnMask.prefix_lm(4, 2).to_cu_seqlens(), "not all full or all causal"),
        (lambda: AttnMask.dilated_blocks(5, 1, 2).to_cu_seqlens(), "query 2 attends 2 keys among \\[0, 3\\)"),
        (lambda: AttnMask.from_json("{"), "no JSON"),
        (lambda: AttnMask.from_json("{}"), "to_json writes"),
        (lambda: AttnMask.from_json(AttnMask.full(3).to_json().replace("3", "2.5")), "num_q must be an int"),
        (
            lambda: AttnMask.from_json(AttnMask.full(3).to_json().replace('"num_q":3', '"num_q":2')),
            "row 0 .* inside its 2 queries",
        ),
    ],
)
def test_mistakes_are_told(convert: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        convert()
