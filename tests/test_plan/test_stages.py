"""Stages: DYNAMIC is never predicted slower than one stage, and takes more where they pay."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import DispatchConfig, DistAttnConfig, GreedyOverlapAlg, OverlapConfig, UniformOverlapAlg
from magi_attention.mask import AttnMask, causal, varlen
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Heads, Machine

HEADS = Heads(num_heads_q=4, num_heads_kv=2, head_dim=16)


def plan_for(mask: AttnMask, machine: Machine, num_ranks: int, *, dynamic: bool, greedy: bool) -> AttnPlan:
    cost = machine.cost_model(HEADS.num_heads_q, HEADS.num_heads_kv, HEADS.head_dim, HEADS.itemsize)
    overlap = OverlapConfig(
        mode=AttnOverlapMode.DYNAMIC if dynamic else AttnOverlapMode.STATIC,
        min_chunk_size=1,
        alg=GreedyOverlapAlg() if greedy else UniformOverlapAlg(),
        calc_cost_factor=cost.cell,
        comm_cost_factor=cost.row,
        latency_cost=cost.latency,
    )
    return build_plan(mask, num_ranks, DistAttnConfig(DispatchConfig(chunk_size=8), overlap))


# Up to 256 keys, the grid on which DYNAMIC predicts has a column for every key: its prediction is the report's.
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_never_predicted_slower_than_one_stage(seed: int, greedy: bool) -> None:
    rng = np.random.default_rng(seed)
    edges = np.unique(np.concatenate([[0, 256], rng.integers(1, 256, 4)]))
    mask = varlen(edges, causal=bool(seed % 2))
    num_ranks = int(rng.integers(2, 9))
    machine = Machine(flops=1e9, bandwidth=float(10 ** rng.uniform(6, 9)), latency=float(10 ** rng.uniform(-8, -4)))
    chosen, one = (
        plan_for(mask, machine, num_ranks, dynamic=dynamic, greedy=greedy).report(HEADS, machine)
        for dynamic in (True, False)
    )
    assert chosen.forward <= one.forward * (1 + 1e-9)
    assert chosen.backward <= one.backward * (1 + 1e-9)


def test_stages_where_they_pay_and_not_where_an_exchange_is_dear() -> None:
    fast, dear = Machine(1e9, 4e7, 1e-9), Machine(1e9, 4e7, 1.0)
    mask = causal(256)
    many = plan_for(mask, fast, 4, dynamic=True, greedy=False)
    assert many.forward.num_stages > 1
    one = plan_for(mask, fast, 4, dynamic=False, greedy=False)
    assert many.report(HEADS, fast).forward < one.report(HEADS, fast).forward
    few = plan_for(mask, dear, 4, dynamic=True, greedy=False)
    assert few.forward.num_stages == few.backward.num_stages == 1


def test_forward_and_backward_choose_for_themselves() -> None:
    seen = {
        (plan.forward.num_stages, plan.backward.num_stages)
        for bandwidth in (1e6, 1e7, 3e7, 1e8)
        for plan in [plan_for(causal(256), Machine(1e9, bandwidth, 1e-7), 4, dynamic=True, greedy=True)]
    }
    assert any(forward != backward for forward, backward in seen)


@pytest.mark.parametrize("greedy", [False, True])
def test_every_degree_delivers_the_same_rows(greedy: bool) -> None:
    mask = varlen([0, 100, 256], causal=True)
    alg = GreedyOverlapAlg() if greedy else UniformOverlapAlg()
    received = set()
    for degree in (1, 2, 3, 7):
        config = DistAttnConfig(DispatchConfig(chunk_size=8), OverlapConfig(degree=degree, min_chunk_size=1, alg=alg))
        plan = build_plan(mask, 4, config)
        assert plan.num_stages == degree
        received.add(tuple(plan.received_rows.tolist()))
    assert len(received) == 1


def test_short_sequences_get_fewer_stages() -> None:
    config = DistAttnConfig(DispatchConfig(chunk_size=8), OverlapConfig(degree=8, min_chunk_size=64))
    plan = build_plan(causal(256), 4, config)
    assert plan.num_stages == max(1, int(plan.received_rows.max()) // 64) < 8
