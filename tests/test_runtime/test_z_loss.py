"""The gradient of lse over ranks: a z-loss, with and without a loss of the output, on every rank or only on some.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims of q/k and of v.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    OverlapConfig,
    SequentialDispatchAlg,
    calc_attn,
    dispatch,
    magi_attn_flex_key,
    plan_of,
    undispatch,
)
from magi_attention.testing.dist import shared_pool
from magi_attention.testing.mask_families import MASK_FAMILIES
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

NUM_TOKENS, HEADS, KV_HEADS = 53, 4, 2


@dataclass(frozen=True)
class Case:
    """``used``: what each rank's loss uses, o(ut), l(se) or both, by rank, repeated.

    ``way``: keys move ("keys"), queries ("queries"), or keys once a node ("hierarchical").
    """

    family: str
    dtype: torch.dtype
    backend: str
    used: tuple[str, ...] = ("ol",)
    num_sink: int = 0
    softcap: float = 0.0
    way: str = "keys"
    compiled: bool = False


def check_case(case: Case) -> None:
    os.environ["MAGI_ATTENTION_BACKEND"] = case.backend
    os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"] = "sum"
    os.environ["MAGI_ATTENTION_BACKWARD_HIGH_PRECISION_REDUCE"] = "1"
    os.environ["MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE"] = "1"
    os.environ["MAGI_ATTENTION_QO_COMM"] = str(int(case.way == "queries"))
    os.environ["MAGI_ATTENTION_HIERARCHICAL_COMM"] = str(int(case.way == "hierarchical"))
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2)) if case.way == "hierarchical" else None
    hq = KV_HEADS if case.way == "queries" else HEADS  # queries move where they are no more than keys
    slices = MASK_FAMILIES[case.family](NUM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    key = magi_attn_flex_key(
        slices.q_ranges,
        slices.k_ranges,
        [("full", "causal", "inv_causal", "bi_causal")[kind] for kind in slices.types],
        NUM_TOKENS,
        NUM_TOKENS,
        hq,
        KV_HEADS,
        16,
        chunk_size=4,
        cp_group_or_mesh=mesh,
        dist_attn_config=DistAttnConfig(
            dispatch_config=DispatchConfig(alg=SequentialDispatchAlg()),
            overlap_config=OverlapConfig(degree=2, min_chunk_size=1),
        ),
    )
    if case.way == "queries":
        assert any(plan_of(key).rank(rank).guests is not None for rank in range(dist.get_world_size()))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    q, k, v = random(NUM_TOKENS, hq, 16), random(NUM_TOKENS, KV_HEADS, 16), random(NUM_TOKENS, KV_HEADS, 24)
    sink = random(case.num_sink, hq) if case.num_sink else None
    dout = random(NUM_TOKENS, hq, 24)
    dlse = random(NUM_TOKENS, hq)
    leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    attend = torch.compile(calc_attn, backend="aot_eager", fullgraph=True) if case.compiled else calc_attn
    out, meta = attend(
        *(dispatch(x, key) for x in leaves[:3]), key, sink=sink, softcap=case.softcap, return_max_logits=True
    )
    lse = meta.lse
    assert lse is not None and meta.max_logits is not None and not meta.max_logits.requires_grad
    used = case.used[dist.get_rank() % len(case.used)]
    # Rows that attend nothing, padding too, have NaN gradients, except of an lse that is a sink's.
    local_dout = dispatch(dout.masked_fill(~slices.dense().any(1)[:, None, None], math.nan), key, pad_value=math.nan)
    local_dlse = dispatch(dlse, key)
    if sink is None:
        local_dlse = torch.where(lse.detach() == -math.inf, math.nan, local_dlse)
    given = [(x, grad) for name, x, grad in (("o", out, local_dout), ("l", lse, local_dlse)) if name in used]
    torch.autograd.backward(*zip(*given, strict=True))
    counts = [undispatch(dispatch(torch.ones(NUM_TOKENS), key) * (name in used), key) for name in "ol"]
    options = {
        "dout": (dout * counts[0][:, None, None]).to(case.dtype),
        "dlse": (dlse * counts[1][:, None]).to(case.dtype),
        "sink": None if sink is None else sink.detach(),
        "softcap": case.softcap,
    }
    tensors = (q.detach(), k.detach(), v.detach(), slices.dense())
    grads = [None if x is None else x.grad for x in (q, k, v, sink)]
    actual = AttnResult(undispatch(out.detach(), key), undispatch(lse.detach(), key), meta.max_logits, *grads)
    assert_results_as_exact(actual, attention_oracle(*tensors, **options), plain_result(*tensors, **options))


def check_cases(cases: list[Case]) -> None:
    for case in cases:
        try:
            check_case(case)
        except Exception as error:
            raise AssertionError(f"{case} on rank {dist.get_rank()} of {dist.get_world_size()}") from error


WAYS = {1: ("keys",), 2: ("keys",), 3: ("keys", "queries"), 4: ("keys", "queries", "hierarchical")}
USED = [("ol",), ("l",), ("o", "l"), ("ol", "l", "o"), ("l", "o", "o", "ol")]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)], ids=str)
def test_on_ranks(num_ranks: int, backend: str, dtype: torch.dtype) -> None:
    families = itertools.cycle(["varlen_causal", "empty_rows", "shared_prefix", "bi_causal"])
    cases = [
        Case(next(families), dtype, backend, used, num_sink, softcap=3.0 * (number % 2), way=way)
        for way in WAYS[num_ranks]
        for number, (used, num_sink) in enumerate(itertools.product(USED, (0, 2)))
    ]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled(num_ranks: int) -> None:
    cases = [Case("varlen_causal", torch.float32, "cpu", used, 2, compiled=True) for used in USED[:3]]
    shared_pool().run(check_cases, cases, num_ranks=num_ranks)
