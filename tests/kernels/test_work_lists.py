"""Work lists: they say what the dense mask says, and those made on the device are those made on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from magi_attention.kernels.hopper.device_segments import build_device_segments
from magi_attention.kernels.hopper.segments import build_segments
from magi_attention.kernels.triton import device_lists
from magi_attention.kernels.triton.device_lists import build_device_bands, build_device_list
from magi_attention.kernels.triton.work_lists import WorkList, build_work_list, transpose
from magi_attention.mask.bands import bands_from_slices, to_dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = list[tuple[int, int, int, int, int]]


@st.composite
def slice_tables(draw: st.DrawFn) -> tuple[Rows, int, int]:
    """Slices ``(q0, q1, k0, k1, type)``, which may be empty and may overlap, of ``num_q`` by ``num_k`` tokens."""
    num_q, num_k = draw(st.integers(1, 70)), draw(st.integers(1, 70))

    def span(length: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, length), st.integers(0, length)).map(lambda ends: (min(ends), max(ends)))

    row = st.tuples(span(num_q), span(num_k), st.integers(0, 3)).map(lambda row: (*row[0], *row[1], row[2]))
    return draw(st.lists(row, min_size=1, max_size=7)), num_q, num_k


def tables(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    return table[:, :2], table[:, 2:4], table[:, 4]


def host_bands(rows: Rows) -> np.ndarray:
    table = np.array(rows, np.int64)
    return bands_from_slices(table[:, :2], table[:, 2:4], table[:, 4])


def cells(work: WorkList, num_q: int, num_k: int, tile: int) -> np.ndarray:
    """How often each cell is visited, walking a list as the kernels do."""
    count = np.zeros((num_q, num_k), np.int64)
    inner, edges = work.inner.tolist(), work.edges.tolist()
    for at, ((inner_from, inner_to), (edge_from, edge_to)) in enumerate(
        zip(work.inner_rows.tolist(), work.edge_rows.tolist(), strict=True)
    ):
        rows = slice(at * tile, min((at + 1) * tile, num_q))
        for begin, end in inner[inner_from:inner_to]:
            count[rows, begin:end] += 1
        queries, keys = np.arange(num_q)[rows, None], np.arange(num_k)[None]
        for begin, end, lo, hi, q_begin, q_end in edges[edge_from:edge_to]:
            inside = (keys >= begin) & (keys < end) & (queries >= q_begin) & (queries < q_end)
            count[rows] += inside & (keys - queries >= lo) & (keys - queries <= hi)
    return count


def used(ranges: Tensor, table: Tensor) -> list[list[list[int]]]:
    rows = table.tolist()
    return [rows[begin:end] for begin, end in ranges.tolist()]


@given(slice_tables(), st.sampled_from([4, 16]), st.sampled_from([4, 8]))
def test_lists_of_the_host_visit_what_is_attended(case: tuple[Rows, int, int], tile: int, block: int) -> None:
    rows, num_q, num_k = case
    bands = host_bands(rows)
    expected = to_dense(bands, num_q, num_k)
    assert np.array_equal(cells(build_work_list(bands, num_q, tile, block), num_q, num_k, tile), expected)
    by_key = build_work_list(transpose(bands), num_k, tile, block)
    assert np.array_equal(cells(by_key, num_k, num_q, tile), expected.T)
    assert sorted(by_key.order.tolist()) == list(range(by_key.num_tiles))


@settings(max_examples=25)
@given(slice_tables(), st.sampled_from([8, 16]), st.booleans())
def test_lists_of_the_device_are_those_of_the_host(case: tuple[Rows, int, int], tile: int, by_key: bool) -> None:
    rows, num_q, num_k = case
    bands = host_bands(rows)
    table = build_device_bands(*tables(rows), num_q, num_k)
    kept = table[(table[:, 0] < table[:, 1])].cpu()
    assert np.array_equal(kept.numpy(), bands)
    length = num_k if by_key else num_q
    expected = build_work_list(transpose(bands) if by_key else bands, length, tile, 8)
    actual = build_device_list(table, length, tile, 8, by_key=by_key)
    assert torch.equal(actual.order.cpu(), expected.order)
    assert used(actual.inner_rows, actual.inner) == used(expected.inner_rows, expected.inner)
    assert used(actual.edge_rows, actual.edges) == used(expected.edge_rows, expected.edges)


@settings(max_examples=25)
@given(slice_tables(), st.sampled_from([8, 16]), st.booleans())
def test_segments_of_the_device_are_those_of_the_host(case: tuple[Rows, int, int], tile: int, by_key: bool) -> None:
    rows, num_q, num_k = case
    bands, table = host_bands(rows), build_device_bands(*tables(rows), num_q, num_k)
    length = num_k if by_key else num_q
    expected = build_segments(transpose(bands) if by_key else bands, length, tile, 8)
    actual = build_device_segments(table, length, tile, 8, by_key=by_key)
    assert torch.equal(actual.order.cpu(), expected.order) and torch.equal(actual.rows.cpu(), expected.rows)
    assert torch.equal(actual.segments[: len(expected.segments)].cpu(), expected.segments)


def test_many_slices() -> None:
    """More than a program looks at together."""
    edges = [0, *sorted(np.random.default_rng(0).choice(np.arange(1, 900), 300, replace=False).tolist()), 900]
    rows = [(begin, end, 0, end, 1) for begin, end in zip(edges, edges[1:], strict=False)]
    bands, table = host_bands(rows), build_device_bands(*tables(rows), 900, 900)
    for by_key in (False, True):
        expected = build_work_list(transpose(bands) if by_key else bands, 900, 64, 32)
        actual = build_device_list(table, 900, 64, 32, by_key=by_key)
        assert torch.equal(actual.order.cpu(), expected.order)
        assert used(actual.inner_rows, actual.inner) == used(expected.inner_rows, expected.inner)
        assert used(actual.edge_rows, actual.edges) == used(expected.edge_rows, expected.edges)


@pytest.mark.parametrize("by_key", [False, True])
def test_tiles_without_room_walk_the_whole_table(monkeypatch: pytest.MonkeyPatch, by_key: bool) -> None:
    monkeypatch.setattr(device_lists, "_ROOM_PER_TILE", 1)
    monkeypatch.setattr(device_lists, "_ROOM_PER_SLICE", 0)
    rows = [(0, 90, start, start + 9, kind) for start, kind in zip(range(0, 90, 9), [0, 1, 2, 2, 0] * 2, strict=True)]
    if by_key:
        rows = [(k0, k1, q0, q1, kind) for q0, q1, k0, k1, kind in rows]
    table = build_device_bands(*tables(rows), 90, 90)
    work = build_device_list(table, 90, 16, 8, by_key=by_key)
    whole = [0, len(rows)]
    without_room = [span == whole for span in work.edge_rows.tolist()]
    assert any(without_room) and not all(without_room)
    expected = to_dense(host_bands(rows), 90, 90)
    assert np.array_equal(cells(work, 90, 90, 16), expected.T if by_key else expected)


def test_ranges_outside_the_tensors_are_clamped() -> None:
    rows = [(-5, 300, 2, 1 << 30, 0), (7, 3, 0, 9, 1), (0, 9, 8, 5, 2), (200, 300, 0, 4, 0)]
    table = build_device_bands(*tables(rows), 64, 48)
    assert table.tolist() == [[0, 64, 2, 48, -61, 47], *[[0] * 6] * 3]


def test_no_types_are_all_full() -> None:
    q_ranges, k_ranges, _ = tables([(0, 9, 3, 20, 1), (9, 12, 0, 5, 3)])
    full = build_device_bands(q_ranges, k_ranges, torch.zeros(2, dtype=torch.int32, device=DEVICE), 12, 20)
    assert torch.equal(build_device_bands(q_ranges, k_ranges, None, 12, 20), full)
