"""The public names as programs already written use them: signatures, defaults and places, word for word."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import magi_attention
from magi_attention import api, comm, utils
from magi_attention.api import functools, magi_attn_interface
from magi_attention.common import AttnForwardMeta, AttnRange, AttnRanges
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.runtime.key import DistAttnRuntimeKey

CONFIG = repr(DistAttnConfig())

# Of functions, as ``inspect.signature`` prints them without annotations.
SIGNATURES: dict[Callable[..., Any], str] = {
    api.flex_flash_attn_func: "(q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, sink=None, sink_layout='sh', "
    "softmax_scale=None, "
    "softcap=0.0, deterministic=False, sm_margin=0, disable_fwd_atomic_reduction=False, disable_bwd_dkv_atomic_reduction=False, "
    "ref_block_size=None, max_seqlen_q=None, auto_range_merge=False, swap_ab=False, pack_gqa=False, cat_gqa=False, sparse_load=False, "
    "swap_bwd_qk_loop=False, return_max_logits=False, index_attn=False, index_attn_indices=None, q_block_size=1, k_block_size=1, "
    "mask=None)",
    api.magi_attn_varlen_key: "(cu_seqlens_q, cu_seqlens_k, num_heads_q, num_heads_kv, head_dim, pad_size=None, chunk_size=None, "
    f"cp_group_or_mesh=None, causal=False, window_size=(-1, -1), dist_attn_config={CONFIG})",
    api.magi_attn_flex_key: "(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, num_heads_q, num_heads_kv, head_dim, "
    f"pad_size=None, chunk_size=None, cp_group_or_mesh=None, dist_attn_config={CONFIG}, is_same_source=True, is_q_permutable=True, "
    "is_k_permutable=True, *, layout_key=None)",
    api.make_varlen_key_for_new_mask_after_dispatch: "(cu_seqlens_q, cu_seqlens_k, key_for_dispatch, causal=False, window_size=(-1, -1), "
    "dist_attn_config=None)",
    api.make_flex_key_for_new_mask_after_dispatch: "(q_ranges, k_ranges, attn_mask_type, key_for_dispatch, dist_attn_config=None, *, "
    "num_heads_q=None, num_heads_kv=None, head_dim=None)",
    magi_attention.init_dist_attn_runtime_key: "(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, num_heads_q, "
    "num_heads_kv, head_dim, pad_size, chunk_size, cp_group, cp_mesh, dist_attn_config)",
    magi_attention.init_dist_attn_runtime_mgr: "(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k, num_heads_q, "
    f"num_heads_kv, head_dim, chunk_size, cp_group, cp_mesh=None, dist_attn_config={CONFIG}, is_same_source=True, is_q_permutable=True, "
    "is_k_permutable=True, ref_dispatch_meta_q=None, ref_dispatch_meta_k=None)",
    DistAttnRuntimeKey.bind: "(self, group=None)",
    api.dispatch: "(x, key, pad_value=0.0, *, attn_role=<AttnRole.QUERY: 'query'>)",
    api.undispatch: "(x, key, is_partial_grad=False, *, attn_role=<AttnRole.QUERY: 'query'>)",
    api.calc_attn: "(q, k, v, key, sink=None, softmax_scale=None, softcap=0.0, return_max_logits=False)",
    api.roll: "(x, shift, dim, key, *, attn_role=<AttnRole.QUERY: 'query'>)",
    api.get_position_ids: "(key, *, attn_role=<AttnRole.QUERY: 'query'>)",
    api.clear_cache: "(cp_group=None)",
    api.compute_pad_size: "(total_seqlen_q, cp_size, chunk_size)",
    api.pad_at_dim: "(x, dim, pad_size, value=0.0, side='right')",
    api.unpad_at_dim: "(x, dim, pad_size)",
    api.squash_batch_dim: "(x)",
    api.apply_padding: "(q_ranges, k_ranges, attn_mask_type, total_seqlen, pad_size)",
    api.infer_attn_mask_from_sliding_window: "(q_range, k_range, window_size)",
    api.infer_attn_mask_from_cu_seqlens: "(cu_seqlens_q, cu_seqlens_k, causal=False, window_size=(-1, -1), global_window_size=0)",
    comm.dsink_all_reduce_op: "()",
    utils.clearup_dist_env: "()",
    AttnForwardMeta: "(lse, max_logits=None)",
    AttnRange: "(start, end)",
    AttnRange.truncate: "(self, start=None, end=None)",
    AttnRange.from_range: "(attn_range, check=False)",
    AttnRange.is_valid_close: "(self, start=None, end=None)",
    AttnRange.is_valid_open: "(self, start=None, end=None)",
    AttnRanges.from_ranges: "(ranges, check=False)",
    AttnRanges.from_cu_seqlens: "(cu_seqlens, seq_len)",
    AttnRanges.to_cu_seqlens: "(self, seq_len)",
    AttnRanges.to_tensor: "(self, device='cpu')",
    AttnRanges.merge_with_split_alignment: "(self, split_alignment=1)",
    DispatchConfig: "(chunk_size=None, uneven_shard=False, alg=<factory>)",
    DistAttnConfig: "(dispatch_config=<factory>, overlap_config=<factory>, grpcoll_config=<factory>)",
}

# Of others, the arguments that the contract names come first, under these names.
LEADING: dict[Callable[..., Any], str] = {
    api.magi_attn_varlen_dispatch: "x",
    api.magi_attn_flex_dispatch: "x",
    api.get_most_recent_key: "cp_group",
    api.magi_attn_key: "mask, num_heads_q, num_heads_kv, head_dim, *, ",
    api.infer_varlen_mask_from_batch: "batch_size, seq_len, device",
    utils.setup_dist_env: "backend=None, base_seed=None, seed_bias",
    OverlapConfig: "enable=True, mode=<AttnOverlapMode.STATIC: 'static'>, degree=1, dynamic_max_degree=8, min_chunk_size=512, "
    "max_num_chunks=64, alg=<factory>, calc_cost_factor=1.0, comm_cost_factor=1.0",
}

# Where programs already written import from: ``module: names``.
PLACES = {
    "magi_attention.common": "AttnForwardMeta AttnRange AttnRanges",
    "magi_attention.common.enum": "AttnMaskType AttnOverlapMode AttnRole AttnType DispatchAlgType OverlapAlgType "
    "DynamicAttnAlgType MagiAttentionKernelBackend MagiAttentionPrecision GroupReduceOp AttnSinkLayout",
    "magi_attention.functional": "flex_flash_attn_func",
    "magi_attention.functional.flex_flash_attn": "flex_flash_attn_func",
    "magi_attention.api.magi_attn_interface": "magi_attn_varlen_key magi_attn_flex_key magi_attn_varlen_dispatch "
    "magi_attn_flex_dispatch make_varlen_key_for_new_mask_after_dispatch make_flex_key_for_new_mask_after_dispatch dispatch undispatch "
    "calc_attn roll get_position_ids get_most_recent_key magi_attn_key clear_cache roll_simple GeneralAttnMaskType "
    "DistAttnRuntimeDictManager dist_attn_runtime_dict_mgr",
    "magi_attention.api.functools": "compute_pad_size pad_at_dim unpad_at_dim squash_batch_dim apply_padding "
    "infer_varlen_mask_from_batch infer_attn_mask_from_sliding_window infer_attn_mask_from_cu_seqlens",
    "magi_attention.api": "magi_attn_varlen_key magi_attn_flex_key magi_attn_varlen_dispatch magi_attn_flex_dispatch "
    "make_varlen_key_for_new_mask_after_dispatch make_flex_key_for_new_mask_after_dispatch dispatch undispatch calc_attn roll "
    "get_position_ids get_most_recent_key compute_pad_size pad_at_dim unpad_at_dim squash_batch_dim apply_padding "
    "infer_varlen_mask_from_batch infer_attn_mask_from_sliding_window infer_attn_mask_from_cu_seqlens flex_flash_attn_func AttnMaskType "
    "AttnOverlapMode AttnRanges AttnForwardMeta DistAttnRuntimeKey DistAttnConfig DispatchConfig OverlapConfig MinHeapDispatchAlg "
    "SequentialDispatchAlg SortedSequentialSelectAlg ToppHeapDispatchAlg LBDispatchAlg DPDispatchAlg BSDispatchAlg UniformOverlapAlg "
    "GreedyOverlapAlg GrpCollConfig clear_cache magi_attn_key roll_simple GeneralAttnMaskType DistAttnRuntimeDictManager "
    "dist_attn_runtime_dict_mgr DispatchAlg OverlapAlg",
    "magi_attention.config": "DistAttnConfig DispatchConfig OverlapConfig GrpCollConfig MinHeapDispatchAlg SequentialDispatchAlg "
    "SortedSequentialSelectAlg ToppHeapDispatchAlg LBDispatchAlg DPDispatchAlg BSDispatchAlg UniformOverlapAlg GreedyOverlapAlg "
    "DispatchAlg OverlapAlg",
    "magi_attention.utils": "setup_dist_env clearup_dist_env",
    "magi_attention.dist_attn_runtime_mgr": "DistAttnRuntimeKey DistAttnRuntimeMgr DistAttnRuntimeDictManager init_dist_attn_runtime_key "
    "init_dist_attn_runtime_mgr",
    "magi_attention": "init_dist_attn_runtime_key init_dist_attn_runtime_mgr",
    "magi_attention.comm": "dsink_all_reduce_op",
}


def bare_signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature(function: Callable[..., Any]) -> None:
    assert bare_signature(function) == SIGNATURES[function]


@pytest.mark.parametrize("function", LEADING, ids=lambda function: function.__qualname__)
def test_leading_arguments(function: Callable[..., Any]) -> None:
    assert bare_signature(function).startswith(f"({LEADING[function]}")


@pytest.mark.parametrize("module", PLACES)
def test_names_are_where_they_were(module: str) -> None:
    here = importlib.import_module(module)
    for name in PLACES[module].split():
        assert hasattr(here, name), f"{module}.{name}"
        # One object under all its names: an `except` or an `isinstance` by any of them works.
        assert getattr(here, name) is next(
            getattr(m, name) for m in (api, functools, magi_attn_interface, here) if hasattr(m, name)
        )
