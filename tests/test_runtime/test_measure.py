"""Measured costs: what they are made of, that all ranks get the same, and that they are measured once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import OverlapConfig, measure_cost_factors
from magi_attention.common.enum import AttnOverlapMode
from magi_attention.runtime import measure
from magi_attention.testing.dist import shared_pool

SHAPE = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16}


def factors(config: OverlapConfig) -> tuple[float, float, float]:
    return config.calc_cost_factor, config.comm_cost_factor, config.latency_cost


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_measured", {})


def test_one_rank_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_cost_factors(**SHAPE, dtype=torch.float32, num_tokens=64)
    assert first.mode is AttnOverlapMode.DYNAMIC
    cell, row, latency = factors(first)
    assert 0 < cell < 1e-3 and 0 < row < 1e-1 and 0 <= latency < 1

    times = iter([5.0, 5.0, 5.0])
    monkeypatch.setattr(measure, "_time", lambda call, device: next(times))
    given = OverlapConfig(degree=3, min_chunk_size=7)
    again = measure_cost_factors(**SHAPE, dtype=torch.float32, num_tokens=64, overlap_config=given)
    assert factors(again) == factors(first)
    assert (again.mode, again.degree, again.min_chunk_size) == (given.mode, 3, 7)
    # Another shape is measured anew.
    assert measure_cost_factors(**SHAPE, dtype=torch.float32, num_tokens=32).calc_cost_factor == 5.0 / 32**2


def test_what_the_numbers_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_time_cell", lambda shape: 3e-9)
    monkeypatch.setattr(measure, "_time_exchange", lambda num_rows, group, shape: 2e-5 + num_rows * 4e-8)
    assert factors(measure_cost_factors(**SHAPE, num_tokens=64)) == pytest.approx((3e-9, 4e-8, 2e-5))


def test_noise_larger_than_what_rows_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_time_cell", lambda shape: 3e-9)
    monkeypatch.setattr(measure, "_time_exchange", lambda num_rows, group, shape: 2e-5 if num_rows == 1 else 1e-5)
    assert factors(measure_cost_factors(**SHAPE, num_tokens=100)) == pytest.approx((3e-9, 1e-7, 2e-5))


def measure_on_ranks() -> tuple[tuple[float, float, float], list[float]]:
    """This rank's factors, and what it had timed by itself; rank 1 computes slowest."""
    timed: list[float] = []
    real = measure._time

    def time_and_note(call, device):  # type: ignore[no-untyped-def]
        seconds = real(call, device) + 0.25 * dist.get_rank()
        timed.append(seconds)
        return seconds

    measure._time = time_and_note
    try:
        config = measure_cost_factors(**SHAPE, dtype=torch.float32, num_tokens=64)
        again = measure_cost_factors(**SHAPE, dtype=torch.float32, num_tokens=64)
    finally:
        measure._time = real
    assert config == again and len(timed) == 3
    return factors(config), timed


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_agree_on_the_slowest(num_ranks: int) -> None:
    results = shared_pool().run(measure_on_ranks, num_ranks=num_ranks)
    assert len({numbers for numbers, _ in results}) == 1
    (cell, row, latency), _ = results[0]
    slowest_few, slowest_many, slowest_kernel = (max(timed[at] for _, timed in results) for at in range(3))
    assert cell == slowest_kernel / 64**2
    if slowest_many > slowest_few:
        assert row == pytest.approx((slowest_many - slowest_few) / 63)
        assert latency == pytest.approx(max(slowest_few - row, 0.0))
    else:
        assert (row, latency) == (slowest_many / 64, slowest_few)


@pytest.mark.parametrize("wrong", [{"num_heads_q": 3, "num_heads_kv": 2}, {"head_dim": 0}, {"num_tokens": 0}])
def test_impossible_shapes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_heads_q must be a multiple"):
        measure_cost_factors(**{**SHAPE, **wrong})
