"""What programs read from a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from magi_attention.api import (
    AttnMaskType,
    AttnRanges,
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    clear_cache,
    magi_attn_flex_key,
    magi_attn_joint_keys,
    magi_attn_key,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    plan_of,
)
from magi_attention.mask import AttnMask, causal, full
from magi_attention.testing.dist import shared_pool

SLICES: dict[str, Any] = {
    "q_ranges": [[0, 10], [10, 32]],
    "k_ranges": [[0, 10], [4, 32]],
    "attn_mask_type": ["causal", "full"],
    "total_seqlen_q": 32,
    "total_seqlen_k": 32,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 8,
}


def test_arguments_as_attributes() -> None:
    config = DistAttnConfig()
    key = magi_attn_flex_key(**SLICES, dist_attn_config=config)
    assert key.q_ranges == AttnRanges.from_ranges([[0, 10], [10, 32]])
    assert key.k_ranges == AttnRanges.from_ranges([[0, 10], [4, 32]])
    assert key.attn_mask_type == (AttnMaskType.CAUSAL, AttnMaskType.FULL)
    assert (key.total_seqlen_q, key.total_seqlen_k) == (32, 32)
    assert (key.num_heads_q, key.num_heads_kv, key.head_dim) == (4, 2, 8)
    assert (key.cp_group, key.cp_mesh) == (None, None)
    assert key.dist_attn_config == config


@pytest.mark.parametrize(
    ("options", "pad_size", "chunk_size"),
    [
        ({}, None, None),
        ({"chunk_size": 5}, 3, 5),
        ({"chunk_size": 5, "pad_size": 3}, 3, 5),
        ({"pad_size": 0, "chunk_size": 8}, 0, 8),
        ({"dist_attn_config": DistAttnConfig(DispatchConfig(chunk_size=7))}, 3, 7),
        ({"dist_attn_config": DistAttnConfig(DispatchConfig(chunk_size=7, uneven_shard=True))}, 0, 7),
    ],
)
def test_sizes_in_use_are_ints(options: dict[str, Any], pad_size: int | None, chunk_size: int | None) -> None:
    key = magi_attn_flex_key(**SLICES, **options)
    layout = plan_of(key).q_layout
    assert type(key.pad_size) is int and type(key.chunk_size) is int
    assert (key.pad_size, key.chunk_size) == (layout.pad_size, layout.chunk_size)
    assert pad_size in (None, key.pad_size)
    assert chunk_size in (None, key.chunk_size)
    assert key == magi_attn_flex_key(**SLICES, **options)


def test_sizes_of_keys_over_one_dispatch() -> None:
    first = magi_attn_flex_key(**SLICES, chunk_size=5)
    second = make_flex_key_for_new_mask_after_dispatch([[0, 32]], [[0, 32]], "full", first)
    joint = magi_attn_joint_keys([causal(32), full(32)], [1, 1], 4, 2, 8, chunk_size=5)
    for key in (second, *joint):
        assert (key.pad_size, key.chunk_size) == (3, 5)


def test_slices_that_are_read_make_the_same_mask() -> None:
    key = magi_attn_varlen_key([0, 20, 32], [0, 20, 32], 4, 2, 8, window_size=(3, 0))
    again = AttnMask.from_slices(key.q_ranges, key.k_ranges, key.attn_mask_type, key.total_seqlen_q, key.total_seqlen_k)
    assert again.attends_same(key.mask)


def test_a_key_that_was_never_planned_has_no_sizes() -> None:
    bare = DistAttnRuntimeKey(causal(32), 4, 2, 8, None, DistAttnConfig())
    with pytest.raises(ValueError, match="this key has no plan"):
        _ = bare.chunk_size


def check_meshes() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra"))
    for mesh in (flat, nodes, nodes["intra"]):
        key = magi_attn_key(causal(32), 4, 2, 8, cp_group_or_mesh=mesh)
        assert key.cp_mesh is mesh
        assert key.cp_group is not None
        assert magi_attn_key(causal(32), 4, 2, 8, cp_group_or_mesh=mesh) is key
        second = make_flex_key_for_new_mask_after_dispatch([[0, 32]], [[0, 32]], "full", key)
        assert second.cp_mesh is mesh
    by_group = magi_attn_key(causal(32), 4, 2, 8, cp_group_or_mesh=dist.group.WORLD)
    assert by_group.cp_mesh is None
    for names in (
        ("dp", "cp"),
        ("dp_replicate", "cp"),
        ("dp_shard", "cp"),
        ("fsdp", "cp"),
        ("cp", "tp"),
        ("pp", "cp"),
        ("ep", "cp"),
    ):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        (other,) = set(names) - {"cp"}
        with pytest.raises(ValueError, match=rf"of which {other} spread other things; pass .*such as mesh\['cp'\]$"):
            magi_attn_key(causal(32), 4, 2, 8, cp_group_or_mesh=mesh)
        with pytest.raises(ValueError, match=rf"of which {other} spread.*mesh\['cp'\] of the mesh that"):
            magi_attn_varlen_key([0, 32], [0, 32], 4, 2, 8, cp_group_or_mesh=mesh[other])
        assert magi_attn_key(causal(32), 4, 2, 8, cp_group_or_mesh=mesh["cp"]).cp_size == 2


def test_meshes() -> None:
    shared_pool().run(check_meshes, num_ranks=4)


def test_a_plan_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="magi_attention")
    clear_cache()
    for _ in range(2):
        magi_attn_flex_key(**SLICES, chunk_size=4)
    (record,) = caplog.records
    assert record.getMessage().startswith("planned 32 queries and 32 keys over 1 ranks in ")
    assert record.getMessage().endswith("chunks of 4, 0 remote stages")
