"""What a user can get wrong is a ValueError that says what was expected, what came, and what to do. By message."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.api import (
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    LBDispatchAlg,
    OverlapConfig,
    calc_attn,
    clear_cache,
    dispatch,
    get_most_recent_key,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_joint_keys,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
    plan_of,
    roll,
    undispatch,
)
from magi_attention.api import flex_flash_attn_func as flex
from magi_attention.common import AttnRange, AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.testing.dist import shared_pool

FLEX: dict[str, Any] = {
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
VARLEN: dict[str, Any] = {
    "cu_seqlens_q": [0, 20, 32],
    "cu_seqlens_k": [0, 20, 32],
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_mask_type": "casual"}, "full.*causal.*inv_causal.*bi_causal.*got 'casual'"),
        ({"attn_mask_type": ["causal", "full"]}, "1 q_ranges, 1 k_ranges and 2 types"),
        ({"k_ranges": [[0, 32], [0, 1]]}, "1 q_ranges, 2 k_ranges"),
        ({"q_ranges": [[0, 33]]}, r"0 <= start <= end <= 32, got \[0, 33\)"),
        ({"q_ranges": [[9, 3]]}, r"got \[9, 3\)"),
        ({"k_ranges": [[-1, 3]]}, r"got \[-1, 3\)"),
        ({"total_seqlen_k": 40}, "is_same_source=True.*total_seqlen_q=32, total_seqlen_k=40.*is_same_source=False"),
        ({"is_q_permutable": False}, "is_q_permutable=False, is_k_permutable=True"),
        ({"num_heads_q": 3}, "num_heads_q must be a multiple of num_heads_kv.*got 3 and 2"),
        ({"head_dim": 0}, "head_dim must be a positive int, got 0"),
        ({"chunk_size": 0}, "chunk_size must be a positive int or None, got 0"),
        ({"pad_size": 3}, "pad_size must be 0 here.*got 3"),
        ({"chunk_size": 5, "pad_size": 2}, "pad_size must be 3 here.*got 2"),
        (
            {"dist_attn_config": DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=8))},
            "given twice and differently: 4 as an argument and 8",
        ),
        (
            {"dist_attn_config": DistAttnConfig(dispatch_config=DispatchConfig(uneven_shard=True)), "pad_size": 4},
            "pad_size must be 0 here.*uneven_shard pads nothing",
        ),
        (
            {"dist_attn_config": DistAttnConfig(dispatch_config=DispatchConfig(alg=LBDispatchAlg()))},
            "only bounds.*use BSDispatchAlg",
        ),
        ({"cp_group_or_mesh": "ranks"}, "not initialised"),
        ({"attn_mask_type": None}, "full.*causal.*inv_causal.*bi_causal.*got None"),
        ({"q_ranges": [[0, 31.5]]}, r"q_ranges must be pairs of ints.*float64"),
        ({"total_seqlen_q": -1}, "total_seqlen_q must be an int of 0 or more, got -1"),
        ({"total_seqlen_k": 32.0}, "total_seqlen_k must be an int of 0 or more, got 32.0"),
        ({"num_heads_kv": True}, "num_heads_kv must be a positive int, got True"),
        ({"head_dim": 8.0}, "head_dim must be a positive int, got 8.0"),
        ({"chunk_size": True}, "chunk_size must be a positive int or None, got True"),
        ({"pad_size": 4.0}, "pad_size must be an int, got 4.0"),
        ({"pad_size": -4}, "pad_size must be 0 here.*got -4"),
        ({"is_same_source": "no"}, "is_same_source must be True or False, got 'no'"),
        ({"dist_attn_config": None}, "dist_attn_config must be a DistAttnConfig.*got None"),
        ({"dist_attn_config": DispatchConfig()}, "dist_attn_config must be a DistAttnConfig.*got DispatchConfig"),
        ({"layout_key": "key"}, "must be a DistAttnRuntimeKey"),
    ],
)
def test_flex_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        magi_attn_flex_key(**{**FLEX, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [1, 32]}, "cu_seqlens"),
        ({"cu_seqlens_q": [0, 20, 10]}, "cu_seqlens"),
        ({"cu_seqlens_q": [0, 32]}, "cu_seqlens"),
        ({"causal": True, "window_size": (4, 0)}, "causal"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"window_size": None}, "window_size must be two ints.*got None"),
        ({"cu_seqlens_q": [0, 20.5, 32]}, "cu_seqlens_q must be cumulative lengths.*20.5"),
        ({"cu_seqlens_k": [[0, 32]]}, "cu_seqlens_k must be cumulative lengths"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k must be cumulative lengths"),
    ],
)
def test_varlen_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        magi_attn_varlen_key(**{**VARLEN, **change})


def test_cells_listed_twice_are_found_under_sanity_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", "1")
    twice = {"q_ranges": [[0, 32], [8, 16]], "k_ranges": [[0, 32], [0, 4]], "attn_mask_type": ["causal", "full"]}
    with pytest.raises(ValueError, match=r"cell \(query 8, key 0\) is attended by two of them"):
        magi_attn_flex_key(**{**FLEX, **twice})


def test_ints_of_any_kind_make_the_same_key() -> None:
    for int_of in (np.int32, np.int64, torch.tensor):
        sizes = {name: int_of(FLEX[name]) for name in FLEX if name not in ("q_ranges", "k_ranges", "attn_mask_type")}
        assert magi_attn_flex_key(**{**FLEX, **sizes}) == magi_attn_flex_key(**FLEX)
    for ranges in (np.array([[0, 32]]), torch.tensor([[0, 32]]), AttnRanges.from_ranges([[0, 32]]), [AttnRange(0, 32)]):
        assert magi_attn_flex_key(**{**FLEX, "q_ranges": ranges}) == magi_attn_flex_key(**FLEX)
    for kind in ("causal", ["causal"], AttnMaskType.CAUSAL, (AttnMaskType.CAUSAL,), 1, np.array([1])):
        assert magi_attn_flex_key(**{**FLEX, "attn_mask_type": kind}) == magi_attn_flex_key(**FLEX)
    for edges in (np.array([0, 20, 32]), torch.tensor([0, 20, 32], dtype=torch.int32), list(torch.tensor([0, 20, 32]))):
        assert magi_attn_varlen_key(**{**VARLEN, "cu_seqlens_q": edges}) == magi_attn_varlen_key(**VARLEN)


def test_what_is_no_tensor() -> None:
    key = magi_attn_flex_key(**FLEX)
    q, k = torch.randn(32, 4, 8), torch.randn(32, 2, 8)
    with pytest.raises(ValueError, match=r"q must be \[32, 4, 8\].*got a ndarray"):
        calc_attn(q.numpy(), k, k, key)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sink must be a floating-point tensor \[num_sink, 4\].*got a list"):
        calc_attn(q, k, k, key, sink=[0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shift must be an int, .*got 1\.5"):
        roll(q, 1.5, 0, key)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be an axis of x"):
        roll(q, 1, (0,), key)  # type: ignore[arg-type]
    axis: Any = np.int64(0)
    assert torch.equal(roll(q, 1, axis, key), q.roll(1, 0))
    with pytest.raises(ValueError, match=r"masks\[1\] must be an AttnMask, got a str"):
        magi_attn_joint_keys([key.mask, "full"], [1, 1], 4, 2, 8)  # type: ignore[list-item]


def test_numbers_that_would_make_every_output_nan() -> None:
    key = magi_attn_flex_key(**FLEX)
    q, k = torch.randn(32, 4, 8), torch.randn(32, 2, 8)
    ranges = torch.tensor([[0, 32]], dtype=torch.int32)
    for wrong in (math.nan, math.inf):
        for attend in (
            lambda **how: calc_attn(q, k, k, key, **how),
            lambda **how: flex(q, k, k, ranges, ranges, **how),
        ):
            with pytest.raises(ValueError, match=f"softcap must be 0 .none. or positive and finite, got {wrong}"):
                attend(softcap=wrong)
            with pytest.raises(ValueError, match=f"softmax_scale must be a finite number.*got {wrong}"):
                attend(softmax_scale=wrong)


def test_tensors_of_another_shape() -> None:
    key = magi_attn_flex_key(**FLEX)
    x = torch.randn(32, 4, 8)
    with pytest.raises(ValueError, match=r"x must be a tensor of 32 rows.*got shape \[31, 4\]"):
        dispatch(torch.randn(31, 4), key)
    with pytest.raises(ValueError, match=r"x must be a tensor of 32 rows.*as dispatch gave them"):
        undispatch(torch.randn(30, 4), key)
    with pytest.raises(ValueError, match="axis 1 first"):
        roll(x, 1, 1, key)
    with pytest.raises(ValueError, match=r"dim must be an axis of x, in \[-3, 3\), got 3"):
        roll(x, 1, 3, key)
    with pytest.raises(ValueError, match="attn_role must be an AttnRole"):
        dispatch(x, key, attn_role="querry")  # type: ignore[arg-type]
    q, k = x, torch.randn(32, 2, 8)
    with pytest.raises(ValueError, match=r"k must be \[32, 2, 8\].*got \[32, 4, 8\]"):
        calc_attn(q, q, k, key)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        calc_attn(q, k.double(), k, key)
    with pytest.raises(ValueError, match=r"sink must be a floating-point tensor \[num_sink, 4\]"):
        calc_attn(q, k, k, key, sink=torch.randn(2, 3))
    with pytest.raises(ValueError, match="softcap must be 0"):
        calc_attn(q, k, k, key, softcap=-1.0)


def test_keys_are_values_and_evicted_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_cache()
    with pytest.raises(ValueError, match="no key was made"):
        get_most_recent_key(None)
    monkeypatch.setenv("MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE", "2")
    first, again = magi_attn_flex_key(**FLEX), magi_attn_flex_key(**FLEX)
    assert first == again
    assert hash(first) == hash(again)
    assert plan_of(first) is plan_of(again)
    second = magi_attn_flex_key(**{**FLEX, "attn_mask_type": "full"})
    assert second != first
    assert get_most_recent_key(None) == second
    dispatch(torch.randn(32, 1), first)  # used: now the second is the oldest
    magi_attn_varlen_key(**VARLEN)
    dispatch(torch.randn(32, 1), first)
    with pytest.raises(ValueError, match="no plan stands behind this key: it was evicted"):
        dispatch(torch.randn(32, 1), second)
    with pytest.raises(ValueError, match="evicted"):
        make_flex_key_for_new_mask_after_dispatch([[0, 32]], [[0, 32]], "full", second)
    with pytest.raises(ValueError, match="key must be a DistAttnRuntimeKey"):
        dispatch(torch.randn(32, 1), "key")  # type: ignore[arg-type]
    clear_cache()
    with pytest.raises(ValueError, match="clear_cache was called"):
        plan_of(first)


def test_second_mask_keeps_the_dispatch() -> None:
    base = magi_attn_varlen_key(**VARLEN, causal=True, chunk_size=4)
    windowed = make_varlen_key_for_new_mask_after_dispatch([0, 20, 32], [0, 20, 32], base, window_size=(3, 0))
    assert plan_of(windowed).q_layout is plan_of(base).q_layout
    with pytest.raises(ValueError, match="cu_seqlens_q must end at 32, the total of key_for_dispatch, got 30"):
        make_varlen_key_for_new_mask_after_dispatch([0, 30], [0, 30], base)
    overlapped = make_varlen_key_for_new_mask_after_dispatch(
        [0, 32], [0, 32], base, dist_attn_config=DistAttnConfig(overlap_config=OverlapConfig(degree=2))
    )
    assert overlapped.config.overlap_config.degree == 2


def test_layout_key() -> None:
    decoder = magi_attn_flex_key(**FLEX)
    cross = {**FLEX, "k_ranges": [[0, 48]], "attn_mask_type": "full", "total_seqlen_k": 48, "is_same_source": False}
    key = magi_attn_flex_key(**cross, is_q_permutable=False, layout_key=decoder)
    assert plan_of(key).q_layout is plan_of(decoder).q_layout
    with pytest.raises(ValueError, match=r"layout_key lays out 32 queries.*Clear the flag"):
        magi_attn_flex_key(**cross, layout_key=decoder)


def test_deprecated_dispatches_still_work() -> None:
    x = torch.randn(32, 3)
    with pytest.warns(DeprecationWarning, match="magi_attn_varlen_key, then dispatch"):
        local, key = magi_attn_varlen_dispatch(x, **VARLEN)
    assert torch.equal(undispatch(local, key), x)
    with pytest.warns(DeprecationWarning, match="magi_attn_flex_key, then dispatch"):
        local, key = magi_attn_flex_dispatch(x, **FLEX)
    assert isinstance(key, DistAttnRuntimeKey)
    assert torch.equal(undispatch(local, key), x)


def make_keys_that_differ() -> str:
    import os

    os.environ["MAGI_ATTENTION_SANITY_CHECK"] = "1"
    mask = "causal" if dist.get_rank() else "full"
    with pytest.raises(ValueError, match=r"rank") as caught:
        magi_attn_flex_key(**{**FLEX, "attn_mask_type": mask})
    return str(caught.value)


def use_meshes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra"))
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    for mesh in (flat, nodes, nodes["intra"], dist.group.WORLD, None):
        key = magi_attn_flex_key(**FLEX, cp_group_or_mesh=mesh)
        assert key.cp_size == (2 if mesh is not None and mesh == nodes["intra"] else 4)
        assert torch.equal(undispatch(dispatch(x, key), key), x)
    with pytest.raises(ValueError, match="1-D or 2-D DeviceMesh"):
        magi_attn_flex_key(**FLEX, cp_group_or_mesh="ranks")


def test_ranks_given_different_masks_are_named() -> None:
    for message in shared_pool().run(make_keys_that_differ, num_ranks=3):
        assert "1" in message
        assert "2" in message


def test_groups_and_meshes() -> None:
    shared_pool().run(use_meshes)
