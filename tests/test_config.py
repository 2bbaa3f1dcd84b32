"""Configs are values: frozen, hashable, equal on equal fields, and never made of what they cannot mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from magi_attention import config as configs
from magi_attention.common.enum import AttnOverlapMode, DispatchAlgType, OverlapAlgType
from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    GreedyOverlapAlg,
    GrpCollConfig,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    OverlapAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)

DISPATCH_ALGS = {
    MinHeapDispatchAlg: DispatchAlgType.MIN_HEAP,
    SequentialDispatchAlg: DispatchAlgType.SEQUENTIAL_SELECT,
    SortedSequentialSelectAlg: DispatchAlgType.SORTED_SEQUENTIAL_SELECT,
    ToppHeapDispatchAlg: DispatchAlgType.TOPP_HEAP,
    LBDispatchAlg: DispatchAlgType.LOWER_BOUND,
    DPDispatchAlg: DispatchAlgType.DYNAMIC_PROGRAMMING,
    BSDispatchAlg: DispatchAlgType.BINARY_SEARCH,
    AffinityDispatchAlg: DispatchAlgType.AFFINITY,
}
OVERLAP_ALGS = {UniformOverlapAlg: OverlapAlgType.UNIFORM, GreedyOverlapAlg: OverlapAlgType.GREEDY}


def test_defaults() -> None:
    overlap = OverlapConfig()
    assert DistAttnConfig() == DistAttnConfig(DispatchConfig(), OverlapConfig(), GrpCollConfig())
    assert (DispatchConfig().chunk_size, DispatchConfig().uneven_shard) == (None, False)
    assert (overlap.enable, overlap.mode, overlap.degree) == (True, AttnOverlapMode.STATIC, 1)
    assert (overlap.dynamic_max_degree, overlap.min_chunk_size, overlap.max_num_chunks) == (8, 512, 64)
    assert overlap.alg == UniformOverlapAlg()
    assert (overlap.calc_cost_factor, overlap.comm_cost_factor) == (1.0, 1.0)


def test_order_of_arguments() -> None:
    dispatch = DispatchConfig(512, True, MinHeapDispatchAlg())
    assert dispatch == DispatchConfig(chunk_size=512, uneven_shard=True, alg=MinHeapDispatchAlg())
    overlap = OverlapConfig(True, AttnOverlapMode.STATIC, 2, None, 16, 32, GreedyOverlapAlg(), 2.0, 3)
    assert (overlap.degree, overlap.dynamic_max_degree, overlap.min_chunk_size, overlap.max_num_chunks) == (
        2,
        None,
        16,
        32,
    )
    assert (overlap.alg, overlap.calc_cost_factor, overlap.comm_cost_factor) == (GreedyOverlapAlg(), 2.0, 3)
    assert DistAttnConfig(dispatch, overlap) == DistAttnConfig(overlap_config=overlap, dispatch_config=dispatch)


@pytest.mark.parametrize("alg", [*DISPATCH_ALGS, *OVERLAP_ALGS])
def test_algorithms_are_values(alg: type) -> None:
    assert alg() == alg()
    assert hash(alg()) == hash(alg())
    assert alg().type is {**DISPATCH_ALGS, **OVERLAP_ALGS}[alg]
    assert len({alg(), MinHeapDispatchAlg()}) == (1 if alg is MinHeapDispatchAlg else 2)
    if alg in DISPATCH_ALGS:
        assert DispatchConfig(alg=alg()).alg == alg()
    else:
        assert OverlapConfig(alg=alg()).alg == alg()


def test_fields_of_algorithms() -> None:
    assert ToppHeapDispatchAlg(top_p=0.25).top_p == 0.25
    assert SortedSequentialSelectAlg(allocation_ratio=0.5) != SortedSequentialSelectAlg()
    assert UniformOverlapAlg(random_costs=True, random_seed=42) == UniformOverlapAlg(True, 42)


@pytest.mark.parametrize(
    "value",
    [DistAttnConfig(), DispatchConfig(), OverlapConfig(), GrpCollConfig(), ToppHeapDispatchAlg(), UniformOverlapAlg()],
)
def test_frozen_and_hashable(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, getattr(value, field))
    assert hash(value) == hash(dataclasses.replace(value))


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "512", True])
def test_bad_chunk_size(chunk_size: Any) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be a positive int, got {chunk_size!r}"):
        DispatchConfig(chunk_size=chunk_size)


@pytest.mark.parametrize(
    "alg", [MinHeapDispatchAlg, "min_heap", DispatchAlgType.MIN_HEAP, UniformOverlapAlg(), DispatchAlg()]
)
def test_what_is_no_dispatch_algorithm(alg: Any) -> None:
    with pytest.raises(ValueError, match=r"alg must be .* such as MinHeapDispatchAlg\(\), got"):
        DispatchConfig(alg=alg)


@pytest.mark.parametrize("alg", [UniformOverlapAlg, "uniform", MinHeapDispatchAlg(), OverlapAlg()])
def test_what_is_no_overlap_algorithm(alg: Any) -> None:
    with pytest.raises(ValueError, match=r"alg must be .* such as UniformOverlapAlg\(\), got"):
        OverlapConfig(alg=alg)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"degree": False}, "degree must be a positive int, got False"),
        ({"degree": -2}, "degree must be a positive int, got -2"),
        ({"degree": 1.0}, "degree must be a positive int, got 1.0"),
        ({"degree": None}, "degree must be a positive int under AttnOverlapMode.STATIC, got None"),
        ({"dynamic_max_degree": 0}, "dynamic_max_degree must be a positive int, got 0"),
        ({"min_chunk_size": 0}, "min_chunk_size must be a positive int, got 0"),
        ({"min_chunk_size": None}, "min_chunk_size must be a positive int, got None"),
        ({"max_num_chunks": -1}, "max_num_chunks must be a positive int, got -1"),
        ({"mode": "static"}, "mode must be AttnOverlapMode.STATIC or AttnOverlapMode.DYNAMIC, got 'static'"),
        ({"enable": 1}, "enable must be True or False, got 1"),
        ({"calc_cost_factor": 0.0}, "calc_cost_factor must be a positive number, got 0.0"),
        ({"comm_cost_factor": -1.0}, "comm_cost_factor must be a positive number, got -1.0"),
        ({"comm_cost_factor": float("nan")}, "comm_cost_factor must be a positive number, got nan"),
        ({"calc_cost_factor": float("inf")}, "calc_cost_factor must be a positive number, got inf"),
        ({"latency_cost": -1.0}, "latency_cost must be 0 or a positive number, got -1.0"),
        ({"latency_cost": float("nan")}, "latency_cost must be 0 or a positive number, got nan"),
        ({"calc_cost_factor": "1"}, "calc_cost_factor must be a positive number, got '1'"),
    ],
)
def test_bad_overlap(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OverlapConfig(**fields)


def test_degree_is_not_looked_at_where_it_means_nothing() -> None:
    assert OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None).degree is None
    assert OverlapConfig(enable=False, degree=None).degree is None


def test_values_that_programs_rely_on() -> None:
    assert ToppHeapDispatchAlg().top_p == 0.0
    assert GrpCollConfig().rdma_chunk_size == 16


def test_a_degree_of_0_is_no_overlap() -> None:
    for config in (OverlapConfig(degree=0), OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=0)):
        assert config.no_overlap
        assert config == OverlapConfig(enable=False, mode=config.mode)
    assert OverlapConfig(enable=False).no_overlap
    assert not OverlapConfig().no_overlap
    assert not OverlapConfig(degree=3).no_overlap


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dispatch_config": OverlapConfig()}, "dispatch_config must be a DispatchConfig, got OverlapConfig"),
        ({"overlap_config": None}, "overlap_config must be an OverlapConfig, got None"),
        ({"grpcoll_config": {}}, "grpcoll_config must be a GrpCollConfig, got {}"),
    ],
)
def test_bad_parts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistAttnConfig(**fields)


@pytest.mark.parametrize(
    "make", [lambda share: ToppHeapDispatchAlg(top_p=share), lambda share: SortedSequentialSelectAlg(share)]
)
def test_bad_shares(make: Any) -> None:
    for share in (-0.1, 1.1, float("nan"), "0.5"):
        with pytest.raises(ValueError, match=r"must be a share, in \[0, 1\], got"):
            make(share)
    make(0)
    make(1.0)


def test_uneven_shard_is_a_bool() -> None:
    with pytest.raises(ValueError, match="uneven_shard must be True or False, got 'yes'"):
        DispatchConfig(uneven_shard="yes")  # type: ignore[arg-type]


def test_every_public_value_says_what_it_is() -> None:
    classes = [one for one in vars(configs).values() if isinstance(one, type) and one.__module__ == configs.__name__]
    assert len(classes) >= 14
    for one in classes:
        assert one.__doc__
        assert not one.__doc__.startswith(f"{one.__name__}("), "the docstring that dataclass makes"
