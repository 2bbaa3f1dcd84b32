"""Names kept for programs already written: each does what it did there."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

import magi_attention
from magi_attention import api
from magi_attention.api import (
    AttnMaskType,
    AttnRanges,
    DistAttnConfig,
    DistAttnRuntimeDictManager,
    OverlapConfig,
    ToppHeapDispatchAlg,
    calc_attn,
    clear_cache,
    dispatch,
    dist_attn_runtime_dict_mgr,
    get_position_ids,
    magi_attn_flex_key,
    magi_attn_key,
    plan_of,
    roll,
    roll_simple,
)
from magi_attention.common.enum import (
    AttnRole,
    AttnSinkLayout,
    DynamicAttnAlgType,
    GroupReduceOp,
    MagiAttentionKernelBackend,
    MagiAttentionPrecision,
)
from magi_attention.config import DispatchConfig
from magi_attention.dist_attn_runtime_mgr import DistAttnRuntimeMgr
from magi_attention.functional import flex_flash_attn_func
from magi_attention.mask import causal
from magi_attention.testing.dist import shared_pool

RANGES = AttnRanges.from_ranges([[0, 32]])
TYPES = [AttnMaskType.CAUSAL]


def make_manager(group: dist.ProcessGroup | None = None, mesh: Any = None) -> DistAttnRuntimeMgr:
    manager = magi_attention.init_dist_attn_runtime_mgr(RANGES, RANGES, TYPES, 32, 32, 4, 2, 8, 4, group, mesh)
    assert isinstance(manager, DistAttnRuntimeMgr)
    return manager


def check_manager() -> None:
    group = dist.group.WORLD if dist.is_initialized() else None
    manager = make_manager(group)
    key = magi_attn_flex_key(RANGES, RANGES, "causal", 32, 32, 4, 2, 8, chunk_size=4)
    assert manager.key is key
    x, generator = torch.arange(64.0).view(32, 2), torch.Generator().manual_seed(0)
    local = manager.dispatch_qo(x)
    assert torch.equal(local, dispatch(x, key))
    assert torch.equal(manager.dispatch_kv(x), local)
    for back in (manager.undispatch_qo(local), manager.undispatch_kv(local), manager.undispatch_qo(local, True)):
        assert torch.equal(back, x)
    for rolled in (manager.roll(local, -1, 0), manager.roll_simple(local, -1, 0), roll_simple(local, -1, 0, key)):
        assert torch.equal(rolled, roll(local, -1, 0, key))
    assert torch.equal(manager.get_position_ids(), get_position_ids(key))
    assert torch.equal(manager.get_position_ids(AttnRole.KEY), get_position_ids(key, attn_role=AttnRole.KEY))
    q, k, v = (dispatch(torch.randn(32, heads, 8, generator=generator), key) for heads in (4, 2, 2))
    sink = torch.zeros(1, 4)
    out, meta = manager.calc_attn(q, k, v, sink, 0.5, 3.0, return_max_logits=True)
    expected, expected_meta = calc_attn(q, k, v, key, sink, 0.5, 3.0, True)
    assert torch.equal(out, expected)
    assert meta.max_logits is not None and expected_meta.max_logits is not None
    assert torch.equal(meta.max_logits, expected_meta.max_logits)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_manager(num_ranks: int) -> None:
    shared_pool().run(check_manager, num_ranks=num_ranks)


def test_manager_without_ranks() -> None:
    check_manager()


def check_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    assert make_manager(dist.group.WORLD, mesh).key.cp_mesh is mesh


def test_manager_of_a_mesh() -> None:
    shared_pool().run(check_mesh, num_ranks=2)


def test_a_layout_of_another_library_is_refused() -> None:
    arguments = (RANGES, RANGES, TYPES, 32, 32, 4, 2, 8, 4, None)
    with pytest.raises(
        ValueError, match=r"ref_dispatch_meta_q and ref_dispatch_meta_k must be None: .*make_flex_key_for_new_mask"
    ):
        magi_attention.init_dist_attn_runtime_mgr(*arguments, ref_dispatch_meta_q="meta")


def test_key_of_the_other_order() -> None:
    key = magi_attention.init_dist_attn_runtime_key(
        RANGES, RANGES, TYPES, 32, 32, 4, 2, 8, 0, 4, None, None, DistAttnConfig()
    )
    assert key is magi_attn_flex_key(RANGES, RANGES, TYPES, 32, 32, 4, 2, 8, chunk_size=4)


def test_the_cache_as_a_dictionary() -> None:
    clear_cache()
    key = magi_attn_key(causal(32), 4, 2, 8)
    other = magi_attn_key(causal(16), 4, 2, 8)
    assert isinstance(dist_attn_runtime_dict_mgr, DistAttnRuntimeDictManager)
    assert dist_attn_runtime_dict_mgr.keys() == [key, other]
    assert dist_attn_runtime_dict_mgr.get_most_recent_key() is other
    assert dist_attn_runtime_dict_mgr.get(key) == dist_attn_runtime_dict_mgr[key] == DistAttnRuntimeMgr(key)
    assert dist_attn_runtime_dict_mgr.keys() == [other, key], "a use makes it the most recently used"
    assert key in dist_attn_runtime_dict_mgr
    dist_attn_runtime_dict_mgr.clear()
    assert key not in dist_attn_runtime_dict_mgr
    assert dist_attn_runtime_dict_mgr.get(key) is None
    assert dist_attn_runtime_dict_mgr.get(key, "none") == "none"
    assert "a name" not in dist_attn_runtime_dict_mgr
    assert dist_attn_runtime_dict_mgr.get("a name") is None  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        dist_attn_runtime_dict_mgr[key]
    with pytest.raises(ValueError, match="no plan stands"):
        plan_of(key)


def test_types_and_enums() -> None:
    assert get_args(GroupReduceOp) == ("sum", "avg", "lse")
    assert get_args(AttnSinkLayout) == ("sh", "shd", "ssh")
    assert str in get_args(api.GeneralAttnMaskType)
    assert [one.value for one in MagiAttentionKernelBackend] == ["ffa", "sdpa", "sdpa_ol", "fa4"]
    assert [one.name for one in DynamicAttnAlgType][:2] == ["NON_COMMUNICATION_QO", "GREEDY_RANDOM_GRID"]
    dtypes = [MagiAttentionPrecision(name).to_torch_dtype() for name in ("bf16", "fp16", "fp32", "fp64")]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_a_sink_layout_that_is_not_here() -> None:
    q, ranges = torch.zeros(4, 1, 8), torch.tensor([[0, 4]], dtype=torch.int32)
    with pytest.raises(ValueError, match="sink_layout must be 'sh' or 'ssh', got 'shd'"):
        flex_flash_attn_func(q, q, q, ranges, ranges, sink=torch.zeros(1, 1, 8), sink_layout="shd")


def test_settings_that_programs_pass() -> None:
    for config in (
        DistAttnConfig(overlap_config=OverlapConfig(degree=0)),
        DistAttnConfig(dispatch_config=DispatchConfig(alg=ToppHeapDispatchAlg())),
    ):
        key = magi_attn_key(causal(32), 4, 2, 8, dist_attn_config=config)
        assert plan_of(key).num_stages <= 1


def test_the_package_alone_imports_no_torch() -> None:
    code = "import sys, magi_attention; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'init_dist_attn'"):
        magi_attention.init_dist_attn  # noqa: B018


def test_names_of_the_interface_module() -> None:
    from magi_attention import api
    from magi_attention.api import magi_attn_interface

    names = (
        "roll_simple GeneralAttnMaskType DistAttnRuntimeDictManager dist_attn_runtime_dict_mgr DispatchAlg OverlapAlg"
    )
    for name in names.split():
        assert getattr(magi_attn_interface, name) is getattr(api, name)
