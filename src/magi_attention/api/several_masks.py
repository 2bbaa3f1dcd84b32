"""Keys of several masks over one dispatch: layers of a model that attend differently share the layout of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from magi_attention.api.argument_orders import in_both_orders_of_heads
from magi_attention.api.functools import infer_attn_mask_from_cu_seqlens
from magi_attention.api.keys import Ranks, make_key, ranks_of
from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.runtime import cache
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.planned import telling_peers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | None
    MaskTypes = str | AttnMaskType | Sequence[str | AttnMaskType]
    Lengths = Tensor | Sequence[int]
    Ranges = AttnRanges | Sequence[Any]


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


@in_both_orders_of_heads
def make_flex_key_for_new_mask_after_dispatch(
    q_ranges: Ranges,
    k_ranges: Ranges,
    attn_mask_type: MaskTypes,
    key_for_dispatch: DistAttnRuntimeKey,
    dist_attn_config: DistAttnConfig | None = None,
    *,
    num_heads_q: int | None = None,
    num_heads_kv: int | None = None,
    head_dim: int | None = None,
) -> DistAttnRuntimeKey:
    """Another mask, given as slices, over rows that ``key_for_dispatch`` has dispatched. See the varlen twin.

    Heads that are omitted are those of ``key_for_dispatch``. As in v1.1.1, all four may also be given by position in the order
    ``num_heads_q, num_heads_kv, head_dim, dist_attn_config``.

    Raises:
        ValueError: an evicted key, or what `magi_attn_flex_key` refuses.
    """
    base = cache.get_session(key_for_dispatch).key
    with telling_peers(base.cp_group):
        mask = AttnMask.from_slices(q_ranges, k_ranges, attn_mask_type, base.total_seqlen_q, base.total_seqlen_k)
    return _key_over(mask, base, dist_attn_config, (num_heads_q, num_heads_kv, head_dim))


def _key_over(
    mask: AttnMask,
    base: DistAttnRuntimeKey,
    config: DistAttnConfig | None,
    heads: tuple[int | None, int | None, int | None] = (None, None, None),
) -> DistAttnRuntimeKey:
    """The key of ``mask`` over the dispatch of ``base``, which gives what is None."""
    num_heads_q, num_heads_kv, head_dim = heads
    return make_key(
        mask,
        base.num_heads_q if num_heads_q is None else num_heads_q,
        base.num_heads_kv if num_heads_kv is None else num_heads_kv,
        base.head_dim if head_dim is None else head_dim,
        ranks=Ranks(base.cp_group, base.cp_mesh, base.ranks_per_node),
        config=base.config if config is None else config,
        pad_size=base.requested_pad_size,
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
    for at, mask in enumerate(masks):
        if not isinstance(mask, AttnMask):
            raise ValueError(f"masks[{at}] must be an AttnMask, got a {type(mask).__name__}")
    companions = tuple(zip(masks, (float(weight) for weight in weights), strict=True))
    first = make_key(
        masks[0],
        num_heads_q,
        num_heads_kv,
        head_dim,
        ranks=ranks_of(cp_group_or_mesh),
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
