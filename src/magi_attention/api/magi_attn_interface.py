"""Keys: what is attended, over which ranks. What is done with them is in ``api.moving``, and can be imported from here too.

key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, num_heads_q, num_heads_kv, head_dim, causal=True, cp_group_or_mesh=group)
x = dispatch(x, key)                       global rows -> this rank's rows
out, meta = calc_attn(q, k, v, key)        every layer, forward and backward
y = undispatch(y, key)                     this rank's rows -> global rows
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from magi_attention import env
from magi_attention.api.functools import infer_attn_mask_from_cu_seqlens
from magi_attention.api.keys import make_key, telling_peers
from magi_attention.api.moving import calc_attn, dispatch, get_position_ids, roll, undispatch
from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.inputs import check_length
from magi_attention.plan import AttnPlan
from magi_attention.runtime import cache
from magi_attention.runtime.group import nodes_of, resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | None
    MaskTypes = str | AttnMaskType | Sequence[str | AttnMaskType]
    Lengths = Tensor | Sequence[int]
    Ranges = AttnRanges | Sequence[Any]


__all__ = [
    "calc_attn",
    "clear_cache",
    "dispatch",
    "get_most_recent_key",
    "get_position_ids",
    "magi_attn_flex_dispatch",
    "magi_attn_flex_key",
    "magi_attn_joint_keys",
    "magi_attn_varlen_dispatch",
    "magi_attn_varlen_key",
    "make_flex_key_for_new_mask_after_dispatch",
    "make_varlen_key_for_new_mask_after_dispatch",
    "plan_of",
    "roll",
    "undispatch",
]


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
        pad_size: padding rows behind q; None or 0 computes them.
        chunk_size: tokens of a chunk, the unit that is assigned to ranks. None: chosen by the planner from the areas of chunks, at
            most ``ceil(total / (8 * cp_size))``, where the 8 is MAGI_ATTENTION_MIN_CHUNKS_PER_RANK.
        cp_group_or_mesh: a ProcessGroup, or a 1-D or 2-D (inter-node x intra-node) DeviceMesh; left out, the default group, or
            one rank where torch.distributed is not initialised.
        causal: every document is causal (bottom-right aligned).
        window_size: ``(left, right)`` as flash-attention's, -1 unbounded; not together with ``causal``.
        dist_attn_config: dispatch and overlap settings.

    Returns:
        A hashable key. Every rank of the group must make it, with the same arguments.

    Raises:
        ValueError: cumulative lengths that do not start at 0 or descend, heads that do not group, a pad_size that does not fit,
            chunk_size given twice and differently, causal together with a window.
        NotImplementedError: an algorithm or mode that is not there yet.
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


def magi_attn_flex_key(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: MaskTypes,
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

    Returns:
        A hashable key, equal for equal arguments; the plan behind it is cached.

    Raises:
        ValueError: ranges outside the lengths, lists of unequal length, an unknown mask type, unequal totals or flags under
            is_same_source, or what `magi_attn_varlen_key` refuses. Under MAGI_ATTENTION_SANITY_CHECK also a cell that two slices list, and
            ranks that were given different arguments.
        NotImplementedError: an algorithm or mode that is not there yet.
    """
    group = resolve_group(cp_group_or_mesh)
    with telling_peers(group):
        total_seqlen_q = check_length(total_seqlen_q, "total_seqlen_q")
        total_seqlen_k = check_length(total_seqlen_k, "total_seqlen_k")
        mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, total_seqlen_q, total_seqlen_k)
        ranks_per_node = nodes_of(cp_group_or_mesh) if env.hierarchical_comm() else None
    return make_key(
        mask,
        num_heads_q,
        num_heads_kv,
        head_dim,
        group=group,
        ranks_per_node=ranks_per_node,
        config=dist_attn_config,
        pad_size=pad_size,
        chunk_size=chunk_size,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        layout_key=layout_key,
    )


def make_varlen_key_for_new_mask_after_dispatch(
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    key_for_dispatch: DistAttnRuntimeKey,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """Another mask of packed documents over rows that ``key_for_dispatch`` has dispatched (say, windowed layers).

    Arguments as in `magi_attn_varlen_key`; heads, group, chunks and layout are those of ``key_for_dispatch``. Its dispatch is kept, so
    the new mask is as balanced as that layout allows. ``dist_attn_config`` None takes the key's.

    Raises:
        ValueError: totals that differ from the key's, an evicted key, or what `magi_attn_varlen_key` refuses.
    """
    base = cache.get_session(key_for_dispatch).key
    with telling_peers(base.cp_group):
        q_ranges, k_ranges, types, total_q, total_k = infer_attn_mask_from_cu_seqlens(
            cu_seqlens_q, cu_seqlens_k, causal=causal, window_size=window_size
        )
        for side, total, expected in (("q", total_q, base.total_seqlen_q), ("k", total_k, base.total_seqlen_k)):
            if total != expected:
                raise ValueError(
                    f"cu_seqlens_{side} must end at {expected}, the total of key_for_dispatch, got {total}; a mask over the same "
                    "dispatch is a mask of the same tokens"
                )
    return make_flex_key_for_new_mask_after_dispatch(q_ranges, k_ranges, types, key_for_dispatch, dist_attn_config)


def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: MaskTypes,
    key_for_dispatch: DistAttnRuntimeKey,
    dist_attn_config: DistAttnConfig | None = None,
) -> DistAttnRuntimeKey:
    """Another mask, given as slices, over rows that ``key_for_dispatch`` has dispatched. See the varlen twin.

    Raises:
        ValueError: an evicted key, or what `magi_attn_flex_key` refuses.
    """
    base = cache.get_session(key_for_dispatch).key
    with telling_peers(base.cp_group):
        mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, base.total_seqlen_q, base.total_seqlen_k)
    return _key_over(mask, base, dist_attn_config)


def _key_over(mask: AttnMask, base: DistAttnRuntimeKey, config: DistAttnConfig | None) -> DistAttnRuntimeKey:
    """The key of ``mask`` over the dispatch of ``base``."""
    return make_key(
        mask,
        base.num_heads_q,
        base.num_heads_kv,
        base.head_dim,
        group=base.cp_group,
        ranks_per_node=base.ranks_per_node,
        config=base.config if config is None else config,
        pad_size=base.pad_size,
        chunk_size=None,
        is_same_source=base.is_same_source,
        is_q_permutable=base.is_q_permutable,
        is_k_permutable=base.is_k_permutable,
        layout_key=base,
        keeps_dispatch=True,
    )


def magi_attn_joint_keys(
    masks: Sequence[AttnMask],
    weights: Sequence[float],
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    pad_size: int | None = None,
    chunk_size: int | None = None,
    cp_group_or_mesh: Group = None,
    dist_attn_config: DistAttnConfig = DistAttnConfig(),  # noqa: B008 - a frozen value
) -> list[DistAttnRuntimeKey]:
    """Keys of several masks over one dispatch: the layers of a model that attend differently, say one full to five windowed.

    Args:
        masks: `AttnMask` values over the same tokens.
        weights: how often each is used in a step; only their ratios matter.
        num_heads_q, num_heads_kv, head_dim, pad_size, chunk_size, cp_group_or_mesh, dist_attn_config: see `magi_attn_varlen_key`.

    Returns:
        A key for each mask, in order. Rows dispatched with any of them are laid out for all: the dispatch balances the weighted
        sum of areas and keeps each mask within bounds.

    Raises:
        ValueError: masks of different lengths, weights that are not positive, or what `magi_attn_flex_key` refuses.
    """
    if not masks or len(masks) != len(weights):
        raise ValueError(f"masks and weights must be equally many, at least one, got {len(masks)} and {len(weights)}")
    companions = tuple(zip(masks, (float(weight) for weight in weights), strict=True))
    group = resolve_group(cp_group_or_mesh)
    first = make_key(
        masks[0],
        num_heads_q,
        num_heads_kv,
        head_dim,
        group=group,
        ranks_per_node=nodes_of(cp_group_or_mesh) if env.hierarchical_comm() else None,
        config=dist_attn_config,
        pad_size=pad_size,
        chunk_size=chunk_size,
        is_same_source=True,
        is_q_permutable=True,
        is_k_permutable=True,
        layout_key=None,
        companions=companions,
    )
    return [first, *(_key_over(mask, first, None) for mask in masks[1:])]


def magi_attn_varlen_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Deprecated: `magi_attn_varlen_key` (its arguments follow ``x``), then `dispatch`. Returns ``(local_x, key)``."""
    _warn_deprecated("magi_attn_varlen_dispatch", "magi_attn_varlen_key")
    key = magi_attn_varlen_key(*args, **kwargs)
    return dispatch(x, key), key


def magi_attn_flex_dispatch(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, DistAttnRuntimeKey]:
    """Deprecated: `magi_attn_flex_key` (its arguments follow ``x``), then `dispatch`. Returns ``(local_x, key)``."""
    _warn_deprecated("magi_attn_flex_dispatch", "magi_attn_flex_key")
    key = magi_attn_flex_key(*args, **kwargs)
    return dispatch(x, key), key


def _warn_deprecated(name: str, key_function: str) -> None:
    warnings.warn(f"{name} is deprecated: call {key_function}, then dispatch", DeprecationWarning, stacklevel=3)


def get_most_recent_key(cp_group: Group = None) -> DistAttnRuntimeKey:
    """The key made last for a group (left out: the default one).

    Raises:
        ValueError: none was made yet.
    """
    return cache.most_recent_key(resolve_group(cp_group))


def plan_of(key: DistAttnRuntimeKey) -> AttnPlan:
    """The plan behind a key: who computes what, who sends what, and when. ``plan.describe()`` prints it.

    Raises:
        ValueError: a key behind which no plan stands.
    """
    return cache.get_session(key).plan


def clear_cache(cp_group: Group = None) -> None:
    """Forget the keys of a group, or, left out, of every group. Keys made before are then refused."""
    cache.clear_sessions(None if cp_group is None else resolve_group(cp_group), all_groups=cp_group is None)
