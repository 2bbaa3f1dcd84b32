"""Under sanity checks, ranks that are given different things all raise, soon; a group of a mesh is the group of its ranks, or an error."""

from __future__ import annotations

import os
import pickle
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import (
    DistAttnConfig,
    DistAttnRuntimeKey,
    OverlapConfig,
    calc_attn,
    clear_cache,
    dispatch,
    get_most_recent_key,
    magi_attn_flex_key,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    plan_of,
    undispatch,
)
from magi_attention.testing.dist import run_ranks, shared_pool

GOOD: dict[str, Any] = {
    "q_ranges": [[0, 32]],
    "k_ranges": [[0, 32]],
    "attn_mask_type": "causal",
    "total_seqlen_q": 32,
    "total_seqlen_k": 32,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 8,
    "chunk_size": 4,
}
TWICE = {"q_ranges": [[0, 32], [0, 4]], "k_ranges": [[0, 32], [0, 1]], "attn_mask_type": "full"}

# What rank 1 is given instead, where that is right by itself; and where it is not, with the error there.
DIFFERENT: list[dict[str, Any]] = [
    {"attn_mask_type": "full"},
    {"num_heads_q": 8},
    {"head_dim": 16},
    {"chunk_size": 8},
    {"is_q_permutable": False, "is_k_permutable": False},
    {"dist_attn_config": DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=1))},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    (TWICE, "attended by two of them"),
    ({"attn_mask_type": "casual"}, "got 'casual'"),
    ({"q_ranges": [[0, 40]]}, "got [0, 40)"),
    ({"pad_size": 3}, "pad_size must be 4 here"),
    ({"num_heads_q": 3}, "got 3 and 2"),
    ({"layout_key": "key"}, "must be a DistAttnRuntimeKey"),
]


def message_of(make: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        make(*args, **kwargs)
    return str(caught.value)


def check_disagreement() -> None:
    os.environ["MAGI_ATTENTION_SANITY_CHECK"] = "1"
    is_odd = dist.get_rank() == 1
    for change in DIFFERENT:
        message = message_of(magi_attn_flex_key, **{**GOOD, **(change if is_odd else {})})
        assert "rank(s) 1 differ from rank(s) 0, 2" in message, change
    for change, expected in REFUSED:
        message = message_of(magi_attn_flex_key, **{**GOOD, **(change if is_odd else {})})
        assert (expected if is_odd else "rank(s) 1 refused what they were given") in message, change
    cu_seqlens, bad = [0, 20, 32], [0, 20, 10]
    message = message_of(magi_attn_varlen_key, bad if is_odd else cu_seqlens, cu_seqlens, 4, 2, 8)
    assert ("never descends" if is_odd else "rank(s) 1 refused") in message
    base = magi_attn_flex_key(**GOOD)  # the ranks are still in step
    kind = "casual" if is_odd else "full"
    message = message_of(make_flex_key_for_new_mask_after_dispatch, [[0, 32]], [[0, 32]], kind, base)
    assert ("casual" if is_odd else "rank(s) 1 refused") in message
    ends = [0, 20, 30] if is_odd else cu_seqlens
    message = message_of(make_varlen_key_for_new_mask_after_dispatch, ends, ends, base)
    assert ("must end at 32" if is_odd else "rank(s) 1 refused") in message
    os.environ["MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE"] = str(int(is_odd))
    assert "rank(s) 1 differ" in message_of(magi_attn_flex_key, **GOOD)
    os.environ["MAGI_ATTENTION_FORWARD_HIGH_PRECISION_REDUCE"] = "0"
    os.environ["MAGI_ATTENTION_PRECISION"] = "fp32" if is_odd else "bf16"
    assert "rank(s) 1 differ" in message_of(magi_attn_flex_key, **GOOD)
    os.environ["MAGI_ATTENTION_PRECISION"] = ""
    unbound = pickle.loads(pickle.dumps(base))
    others = pickle.loads(pickle.dumps(magi_attn_flex_key(**{**GOOD, "head_dim": 16})))
    assert "rank(s) 1 differ" in message_of((others if is_odd else unbound).bind)
    assert unbound.bind() is magi_attn_flex_key(**GOOD) is base


def refuse_alone() -> float:
    """Rank 1 is wrong, and nobody else comes: it says so, in its own words, when the group's timeout is over at the latest."""
    os.environ["MAGI_ATTENTION_SANITY_CHECK"] = "1"
    start = time.monotonic()
    if dist.get_rank() == 1:
        assert "got 'casual'" in message_of(magi_attn_flex_key, **{**GOOD, "attn_mask_type": "casual"})
    return time.monotonic() - start


def test_all_ranks_raise_where_they_were_given_different_things() -> None:
    shared_pool().run(check_disagreement, num_ranks=3, timeout=60.0)  # one that waited would not be back by then


def test_a_refusal_that_nobody_hears() -> None:
    assert max(run_ranks(refuse_alone, 2, group_timeout=1.0, timeout=30.0)) < 10.0


def attend_over(group: Any, rounds: int = 1) -> DistAttnRuntimeKey:
    """Causal attention over ``group``, against torch's own in float64: output and every gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(23, 2, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True
    ).transpose(0, 1)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for _ in range(rounds):
        key = magi_attn_flex_key([[0, 23]], [[0, 23]], "causal", 23, 23, 2, 2, 8, chunk_size=2, cp_group_or_mesh=group)
        out = undispatch(calc_attn(*(dispatch(x, key) for x in (q, k, v)), key)[0], key)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted)
    return key


def check_groups() -> None:
    rank = dist.get_rank()
    halves = dist.new_group([0, 2]), dist.new_group([3, 1])
    mine, others = halves[rank % 2], halves[1 - rank % 2]
    everyone = dist.new_group([0, 1, 2, 3])
    assert "is not in the cp_group_or_mesh" in message_of(magi_attn_flex_key, **GOOD, cp_group_or_mesh=others)
    key, wide = attend_over(mine), attend_over(dist.group.WORLD)
    assert attend_over(mine) == key != wide
    assert (key.cp_size, wide.cp_size) == (2, 4)
    assert (get_most_recent_key(mine), get_most_recent_key(dist.group.WORLD)) == (key, wide)
    failures: list[BaseException] = []

    def work(group: Any) -> None:
        try:
            attend_over(group, rounds=10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(group,)) for group in (mine, everyone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    clear_cache(mine)
    assert "clear_cache was called" in message_of(plan_of, key)
    plan_of(wide)


def check_meshes(store: str) -> None:
    rank = dist.get_rank()
    column = DeviceMesh("cpu", [[1], [3]])
    for number in range(2):  # in a second process group, the mesh's group is another
        if rank % 2:
            assert attend_over(column).cp_size == 2
        else:
            assert "is not in the cp_group_or_mesh" in message_of(magi_attn_flex_key, **GOOD, cp_group_or_mesh=column)
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{store}-{number}", rank=rank, world_size=4)
        column = DeviceMesh("cpu", [[1], [3]])
    dist.new_group([0, 1])
    pair = DeviceMesh("cpu", [[0], [2]])
    if rank in (0, 2):
        message = message_of(magi_attn_flex_key, **GOOD, cp_group_or_mesh=pair)
        assert "[[0], [2]] of this 2-D mesh are in" in message
    assert attend_over(DeviceMesh("cpu", [[3, 2], [1, 0]])).cp_size == 4


def test_groups_that_are_parts_of_the_world() -> None:
    shared_pool().run(check_groups)


def test_meshes_that_are_parts_of_the_world(tmp_path: Any) -> None:
    shared_pool().run(check_meshes, str(tmp_path / "store"), timeout=60.0)
