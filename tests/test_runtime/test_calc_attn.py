"""`dispatch`, `calc_attn`, `undispatch` on several ranks against the oracle on the global mask: outputs, statistics, every gradient."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from magi_attention.api import (
    AffinityDispatchAlg,
    AttnOverlapMode,
    BSDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    calc_attn,
    dispatch,
    magi_attn_flex_key,
    plan_of,
    undispatch,
)
from magi_attention.common.enum import AttnRole
from magi_attention.config import DispatchAlg
from magi_attention.testing.dist import shared_pool
from magi_attention.testing.mask_families import MASK_FAMILIES
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

NUM_TOKENS = 83  # prime: nothing divides


@dataclass(frozen=True)
class Case:
    """``heads``: of q and of k, v; ``dims``: of q, k and of v."""

    family: str
    dtype: torch.dtype
    backend: str
    degree: int = 1
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 24)
    num_sink: int = 0
    softcap: float = 0.0
    uneven: bool = False
    greedy: bool = False
    chunk_size: int | None = 4
    moves_queries: bool = False
    is_q_permutable: bool = True
    ranks_per_node: int | None = None
    alg: DispatchAlg = field(default_factory=AffinityDispatchAlg)
    mode: AttnOverlapMode = AttnOverlapMode.STATIC


def check_case(case: Case) -> None:
    """Run on every rank, which each compares the whole result with the oracle."""
    os.environ["MAGI_ATTENTION_BACKEND"] = case.backend
    os.environ["MAGI_ATTENTION_SANITY_CHECK"] = "1"
    os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"] = "sum"
    os.environ["MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE"] = "1"
    os.environ["MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE"] = "1"
    os.environ["MAGI_ATTENTION_QO_COMM"] = str(int(case.moves_queries))
    os.environ["MAGI_ATTENTION_HIERARCHICAL_COMM"] = str(int(case.ranks_per_node is not None))
    mesh = None
    if case.ranks_per_node is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // case.ranks_per_node, case.ranks_per_node))
    slices = MASK_FAMILIES[case.family](NUM_TOKENS)
    same_source = slices.num_q == slices.num_k
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    (hq, hk), (d, dv) = case.heads, case.dims
    q, k = random(slices.num_q, hq, d), random(slices.num_k, hk, d)
    v, dout = random(slices.num_k, hk, dv), random(slices.num_q, hq, dv)
    sink = random(case.num_sink, hq) if case.num_sink else None
    key = magi_attn_flex_key(
        slices.q_ranges,
        slices.k_ranges,
        [("full", "causal", "inv_causal", "bi_causal")[kind] for kind in slices.types],
        slices.num_q,
        slices.num_k,
        hq,
        hk,
        d,
        chunk_size=case.chunk_size,
        cp_group_or_mesh=mesh,
        dist_attn_config=DistAttnConfig(
            dispatch_config=DispatchConfig(uneven_shard=case.uneven, alg=case.alg),
            overlap_config=OverlapConfig(
                mode=case.mode,
                degree=case.degree,
                min_chunk_size=1,
                **({"alg": GreedyOverlapAlg()} if case.greedy else {}),
            ),
        ),
        is_same_source=same_source,
        is_q_permutable=case.is_q_permutable,
        is_k_permutable=case.is_q_permutable,
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)] + ([] if sink is None else [sink.clone().requires_grad_()])
    local_q = dispatch(leaves[0], key)
    local_k = dispatch(leaves[1], key, attn_role=AttnRole.KEY)
    local_v = dispatch(leaves[2], key, attn_role=AttnRole.VALUE)
    local_out, meta = calc_attn(
        local_q,
        local_k,
        local_v,
        key,
        sink=leaves[3] if sink is not None else None,
        softcap=case.softcap,
        return_max_logits=True,
    )
    out = undispatch(local_out, key)
    assert meta.lse is not None
    lse = undispatch(meta.lse, key)
    out.backward(dout)
    grads = [leaf.grad for leaf in leaves] + ([None] if sink is None else [])
    actual = AttnResult(out.detach(), lse, meta.max_logits, *grads)
    attended = slices.dense()
    options = {"dout": dout, "sink": sink, "softcap": case.softcap}
    truth = attention_oracle(q, k, v, attended, **options)
    assert_results_as_exact(actual, truth, plain_result(q, k, v, attended, **options))
    assert not local_out.isnan().any(), "padding rows included"
    if case.moves_queries:
        assert plan_of(key).areas.sum() == int(attended.sum())


def check_cases(cases: list[Case]) -> None:
    """Several cases in one visit to the ranks; the first that fails says which it is."""
    for case in cases:
        try:
            check_case(case)
        except Exception as error:
            raise AssertionError(f"{case} on rank {dist.get_rank()} of {dist.get_world_size()}") from error


FAMILIES = list(MASK_FAMILIES)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_family_in_float64(num_ranks: int, degree: int) -> None:
    cases = [
        Case(
            family,
            torch.float64,
            "reference",
            degree,
            num_sink=2 * (at % 2),
            softcap=(at % 3) * 5.0,
            greedy=at % 2 == 0,
        )
        for at, family in enumerate(FAMILIES)
    ]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_family_in_low_precision(num_ranks: int, dtype: torch.dtype) -> None:
    cases = [
        Case(family, dtype, "cpu", 1 + at % 4, num_sink=at % 2, dims=((16, 16), (16, 24), (40, 8))[at % 3])
        for at, family in enumerate(FAMILIES)
    ]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)


def test_heads_uneven_shards_and_chunks() -> None:
    cases = [
        Case("varlen_causal", torch.float64, "reference", heads=(3, 3)),
        Case("varlen_causal", torch.float64, "reference", heads=(4, 1)),
        Case("varlen_causal", torch.float64, "reference", uneven=True, chunk_size=5),
        Case("random_a", torch.float64, "reference", uneven=True, chunk_size=40, degree=2),
        Case("causal", torch.float64, "reference", chunk_size=None),
        Case("window", torch.float64, "reference", chunk_size=1, degree=3),
        Case("causal", torch.float64, "reference", is_q_permutable=False),
        Case("random_cross", torch.float64, "reference", is_q_permutable=False, degree=2),
    ]
    shared_pool().run(check_cases, cases)


def test_every_dispatcher_and_chosen_stages() -> None:
    algorithms = (
        MinHeapDispatchAlg(),
        SequentialDispatchAlg(),
        SortedSequentialSelectAlg(),
        ToppHeapDispatchAlg(top_p=0.5),
        BSDispatchAlg(),
    )
    families = ("varlen_causal", "random_a", "causal", "window", "varlen_causal")
    cases = [
        Case(family, torch.float64, "reference", 1 + at % 3, alg=alg, greedy=at % 2 == 1)
        for at, (alg, family) in enumerate(zip(algorithms, families, strict=True))
    ]
    cases += [
        Case("varlen_causal", torch.float64, "reference", chunk_size=8, alg=DPDispatchAlg()),
        Case("causal", torch.float64, "reference", mode=AttnOverlapMode.DYNAMIC),
        Case("varlen_causal", torch.float64, "reference", mode=AttnOverlapMode.DYNAMIC, greedy=True),
    ]
    shared_pool().run(check_cases, cases)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_queries_that_move(num_ranks: int) -> None:
    cases = [
        Case(family, torch.float64, "reference", 1 + at % 3, heads=(2, 2), moves_queries=True, num_sink=at % 2)
        for at, family in enumerate(FAMILIES)
    ]
    cases += [Case(family, torch.float32, "cpu", heads=(2, 2), moves_queries=True) for family in FAMILIES[::4]]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (2, 1), (4, 4), (4, 1)])
def test_rows_that_cross_between_nodes_once(num_ranks: int, ranks_per_node: int) -> None:
    cases = [
        Case(
            family,
            torch.float64,
            "reference",
            1 + at % 3,
            heads=(2, 2),
            ranks_per_node=ranks_per_node,
            moves_queries=at % 4 == 3,
        )
        for at, family in enumerate(FAMILIES)
    ]
    cases += [Case("varlen_causal", torch.bfloat16, "cpu", 2, ranks_per_node=ranks_per_node)]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)


def test_hierarchy_without_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_HIERARCHICAL_COMM", "1")
    with pytest.raises(ValueError, match="pass a 2-D DeviceMesh"):
        magi_attn_flex_key([[0, 8]], [[0, 8]], "full", 8, 8, 1, 1, 8)
