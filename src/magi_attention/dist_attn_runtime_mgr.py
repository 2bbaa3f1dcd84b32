"""Kept for programs already written: the key, and its manager, under the names and in the argument order of the module that held them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from magi_attention.api import magi_attn_flex_key
from magi_attention.api.runtime_mgr import DistAttnRuntimeDictManager, DistAttnRuntimeMgr
from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.config import DistAttnConfig
from magi_attention.runtime.key import DistAttnRuntimeKey

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "DistAttnRuntimeDictManager",
    "DistAttnRuntimeKey",
    "DistAttnRuntimeMgr",
    "init_dist_attn_runtime_key",
    "init_dist_attn_runtime_mgr",
]


def init_dist_attn_runtime_key(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Sequence[AttnMaskType],
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int | None,
    chunk_size: int | None,
    cp_group: dist.ProcessGroup | None,
    cp_mesh: DeviceMesh | None,
    dist_attn_config: DistAttnConfig,
) -> DistAttnRuntimeKey:
    """`magi_attn_flex_key` in another order of arguments. ``cp_mesh`` is used where it is given, ``cp_group`` otherwise.

    Raises:
        ValueError: what `magi_attn_flex_key` refuses.
    """
    return magi_attn_flex_key(
        q_ranges,
        k_ranges,
        attn_mask_type,
        total_seqlen_q,
        total_seqlen_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size=pad_size,
        chunk_size=chunk_size,
        cp_group_or_mesh=cp_group if cp_mesh is None else cp_mesh,
        dist_attn_config=dist_attn_config,
        is_same_source=total_seqlen_q == total_seqlen_k,
    )


def init_dist_attn_runtime_mgr(
    q_ranges: AttnRanges,
    k_ranges: AttnRanges,
    attn_mask_type: Sequence[AttnMaskType],
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    chunk_size: int | None,
    cp_group: dist.ProcessGroup | None,
    cp_mesh: DeviceMesh | None = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - a frozen value
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    ref_dispatch_meta_q: None = None,
    ref_dispatch_meta_k: None = None,
) -> DistAttnRuntimeMgr:
    """The manager of the key that `magi_attn_flex_key` makes of these arguments: its functions as methods.

    Args:
        cp_mesh: used where it is given, ``cp_group`` otherwise.
        ref_dispatch_meta_q, ref_dispatch_meta_k: None only; `make_flex_key_for_new_mask_after_dispatch` keeps a dispatch.

    Raises:
        ValueError: a ref_dispatch_meta, or what `magi_attn_flex_key` refuses.
    """
    if ref_dispatch_meta_q is not None or ref_dispatch_meta_k is not None:
        raise ValueError(
            "ref_dispatch_meta_q and ref_dispatch_meta_k must be None: to keep the dispatch of an earlier key, call "
            "make_flex_key_for_new_mask_after_dispatch with that key"
        )
    return DistAttnRuntimeMgr(
        magi_attn_flex_key(
            q_ranges,
            k_ranges,
            attn_mask_type,
            total_seqlen_q,
            total_seqlen_k,
            num_heads_q,
            num_heads_kv,
            head_dim,
            chunk_size=chunk_size,
            cp_group_or_mesh=cp_group if cp_mesh is None else cp_mesh,
            dist_attn_config=dist_attn_config,
            is_same_source=is_same_source,
            is_q_permutable=is_q_permutable,
            is_k_permutable=is_k_permutable,
        )
    )
