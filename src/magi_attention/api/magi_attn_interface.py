"""Keys: what is attended, over which ranks. `api.moving` holds what is done with them, `api.several_masks` more
keys for one dispatch; both can be imported from here too.

key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, num_heads_q, num_heads_kv, head_dim, causal=True, cp_group_or_mesh=group)
x = dispatch(x, key)                       global rows -> this rank's rows
out, meta = calc_attn(q, k, v, key)        every layer, forward and backward
y = undispatch(y, key)                     this rank's rows -> global rows
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from magi_attention.api.argument_orders import after_x, in_both_orders
from magi_attention.api.functools import infer_attn_mask_from_cu_seqlens
from magi_attention.api.keys import make_key, ranks_of
from magi_attention.api.moving import calc_attn, dispatch, get_position_ids, roll, undispatch
from magi_attention.api.runtime_mgr import DistAttnRuntimeDictManager, dist_attn_runtime_dict_mgr
from magi_attention.api.several_masks import (
    magi_attn_joint_keys,
    make_flex_key_for_new_mask_after_dispatch,
    make_varlen_key_for_new_mask_after_dispatch,
)
from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.config import DispatchAlg, DistAttnConfig, OverlapAlg
from magi_attention.mask import AttnMask
from magi_attention.mask.inputs import check_length
from magi_attention.plan import AttnPlan
from magi_attention.runtime import cache
from magi_attention.runtime.group import resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.planned import telling_peers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | None
    Lengths = Tensor | Sequence[int]
    Ranges = AttnRanges | Sequence[Any]

GeneralAttnMaskType: TypeAlias = str | AttnMaskType | Sequence[str | AttnMaskType]

# Under the name that programs already written may use.
roll_simple = roll

__all__ = [
    "DispatchAlg",
    "DistAttnRuntimeDictManager",
    "GeneralAttnMaskType",
    "OverlapAlg",
    "calc_attn",
    "clear_cache",
    "dispatch",
    "dist_attn_runtime_dict_mgr",
    "get_most_recent_key",
    "get_position_ids",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_joint_keys",
    "magi_attn_key",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "plan_of",
    "roll",
    "roll_simple",
    "undispatch",
]


@in_both_orders
def magi_attn_varlen_key(
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - a frozen value
) -> DistAttnRuntimeKey:
    """The key of packed documents, each attending itself.

    Args:
        cu_seqlens_q, cu_seqlens_k: ``[num_documents + 1]`` cumulative lengths in tokens, starting at 0 (int tensors or lists).
        num_heads_q, num_heads_kv, head_dim: of the tensors that `calc_attn` will be given.
        pad_size: padding rows after q; None or 0 computes them.
        chunk_size: tokens of a chunk, the unit that is assigned to ranks. None: chosen by the planner from the areas of chunks, at
            most ``ceil(total / (8 * cp_size))``, where the 8 is MAGI_ATTENTION_MIN_CHUNKS_PER_RANK.
        cp_group_or_mesh: a ProcessGroup, or a 1-D or 2-D (inter-node x intra-node) DeviceMesh; omitted, the default group, or one rank
            where torch.distributed is not initialised. Of a mesh with an axis named for data, tensor, pipeline or expert parallelism,
            pass the submesh for the sequence.
        causal: every document is causal (bottom-right aligned).
        window_size: ``(left, right)`` as flash-attention's, -1 unbounded; not together with ``causal``.
        dist_attn_config: dispatch and overlap settings.

    Two released orders of the arguments after ``head_dim`` work: this one (v1.1.0), and ``pad_size, cp_group_or_mesh, causal,
    window_size, dist_attn_config, chunk_size`` (v1.1.1). The types of the arguments tell them apart.

    Returns:
        A hashable key. Every rank of the group must make it, with the same arguments.

    Raises:
        ValueError: cumulative lengths that do not start at 0 or descend, heads that are missing (as in v1.0) or do not group, a pad_size
            that does not fit, chunk_size given twice and differently, causal together with a window, or an algorithm that cannot serve.
    """
    with telling_peers(resolve_group(cp_group_or_mesh)):
        q_ranges, k_ranges, types, total_q, total_k = infer_attn_mask_from_cu_seqlens(
            cu_seqlens_q, cu_seqlens_k, causal=causal, window_size=window_size
        )
    return magi_attn_flex_key(
        q_ranges,
        k_ranges,
        types,
        total_q,
        total_k,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size=pad_size,
        chunk_size=chunk_size,
        cp_group_or_mesh=cp_group_or_mesh,
        dist_attn_config=dist_attn_config,
        is_same_source=total_q == total_k,
    )


@in_both_orders
def magi_attn_flex_key(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: GeneralAttnMaskType,
    total_seqlen_q: int,
    total_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - a frozen value
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    *,
    layout_key: DistAttnRuntimeKey | None = None,
) -> DistAttnRuntimeKey:
    """The key of any mask, given as slices.

    Args:
        q_ranges, k_ranges: half-open token ranges, one of each a slice (`AttnRanges`, or lists of pairs).
        attn_mask_type: one type for all slices, or one each: "full", "causal", "inv_causal", "bi_causal", or `AttnMaskType`.
        total_seqlen_q, total_seqlen_k: lengths in tokens, unpadded.
        num_heads_q, num_heads_kv, head_dim, pad_size, chunk_size, cp_group_or_mesh, dist_attn_config: see `magi_attn_varlen_key`.
        is_same_source: keys are made of the same rows as queries (self-attention), so one layout serves both. False for
            cross-attention, where q and k have lengths, chunks and padding of their own.
        is_q_permutable, is_k_permutable: a side that is not is sharded in order, or as ``layout_key`` lays out its q.
        layout_key: an earlier key of the same group.

    As for `magi_attn_varlen_key`, v1.1.1's order works too: ``pad_size, cp_group_or_mesh, dist_attn_config, is_same_source,
    is_q_permutable, is_k_permutable, chunk_size``.

    Returns:
        A hashable key, equal for equal arguments; the plan of it is cached.

    Raises:
        ValueError: ranges outside the lengths, lists of unequal length, an unknown mask type, unequal totals or flags under
            is_same_source, or what `magi_attn_varlen_key` refuses. Under MAGI_ATTENTION_SANITY_CHECK also a cell that two slices list, and
            ranks that were given different arguments.
    """
    with telling_peers(resolve_group(cp_group_or_mesh)):
        total_seqlen_q = check_length(total_seqlen_q, "total_seqlen_q")
        total_seqlen_k = check_length(total_seqlen_k, "total_seqlen_k")
        mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)
    return magi_attn_key(
        mask,
        num_heads_q,
        num_heads_kv,
        head_dim,
        pad_size=pad_size,
        chunk_size=chunk_size,
        cp_group_or_mesh=cp_group_or_mesh,
        dist_attn_config=dist_attn_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        layout_key=layout_key,
    )


def magi_attn_key(
    mask: AttnMask,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - a frozen value
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    layout_key: DistAttnRuntimeKey | None = None,
) -> DistAttnRuntimeKey:
    """The key of a mask that is a value: `AttnMask.varlen(...)`, `AttnMask.from_mask_mod(...)` and so on.

    Args:
        mask: what is attended; its lengths are the totals, unpadded.
        num_heads_q, num_heads_kv, head_dim, pad_size, chunk_size, cp_group_or_mesh, dist_attn_config: see `magi_attn_varlen_key`.
        is_same_source, is_q_permutable, is_k_permutable, layout_key: see `magi_attn_flex_key`.

    Returns:
        A hashable key, equal to that of `magi_attn_flex_key` for the same slices; the plan of it is cached.

    Raises:
        ValueError: ``mask`` is no AttnMask, or what `magi_attn_flex_key` refuses.
    """
    if not isinstance(mask, AttnMask):
        raise ValueError(
            f"mask must be an AttnMask, got a {type(mask).__name__}; call magi_attn_flex_key or magi_attn_varlen_key for a mask in parts"
        )
    return make_key(
        mask,
        num_heads_q,
        num_heads_kv,
        head_dim,
        ranks=ranks_of(cp_group_or_mesh),
        config=dist_attn_config,
        pad_size=pad_size,
        chunk_size=chunk_size,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        layout_key=layout_key,
    )


@after_x(magi_attn_varlen_key)
def magi_attn_varlen_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Deprecated: `magi_attn_varlen_key` (its arguments follow ``x``, in either order), then `dispatch`. Returns ``(local_x, key)``."""
    _warn_deprecated("magi_attn_varlen_dispatch", "magi_attn_varlen_key")
    key = magi_attn_varlen_key(*args, **kwargs)
    return dispatch(x, key), key


@after_x(magi_attn_flex_key)
def magi_attn_flex_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Deprecated: `magi_attn_flex_key` (its arguments follow ``x``, in either order), then `dispatch`. Returns ``(local_x, key)``."""
    _warn_deprecated("magi_attn_flex_dispatch", "magi_attn_flex_key")
    key = magi_attn_flex_key(*args, **kwargs)
    return dispatch(x, key), key


def _warn_deprecated(name: str, key_function: str) -> None:
    warnings.warn(f"{name} is deprecated: call {key_function}, then dispatch", DeprecationWarning, stacklevel=3)


def get_most_recent_key(cp_group: Group = None) -> DistAttnRuntimeKey:
    """The key made last for a group (omitted: the default one).

    Raises:
        ValueError: none was made yet.
    """
    return cache.most_recent_key(resolve_group(cp_group))


def plan_of(key: DistAttnRuntimeKey) -> AttnPlan:
    """The plan of a key: who computes what, who sends what, and when. ``plan.describe()`` prints it.

    Raises:
        ValueError: a key that has no plan.
    """
    return cache.get_session(key).plan


def clear_cache(cp_group: Group = None) -> None:
    """Forget the keys of a group, or, omitted, of every group. Keys made before are then refused."""
    cache.clear_sessions(None if cp_group is None else resolve_group(cp_group), all_groups=cp_group is None)
