"""Where a user's arguments and the environment become a key."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from magi_attention import env
from magi_attention.config import DistAttnConfig
from magi_attention.kernels.interface import AttnSettings, Backend
from magi_attention.kernels.registry import pick
from magi_attention.mask import AttnMask
from magi_attention.runtime import checks
from magi_attention.runtime.group import mesh_of, nodes_of, resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.planned import planned, telling_peers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Over which ranks a key spreads its mask. ``per_node``: given, rows cross between nodes once. Fields as in `DistAttnRuntimeKey`."""

    group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    per_node: int | None


def ranks_of(cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> Ranks:
    """The ranks that a user names, and whether the environment asks to mind their nodes. ValueError: see `resolve_group`, `nodes_of`."""
    group = resolve_group(cp_group_or_mesh)
    with telling_peers(group):
        per_node = nodes_of(cp_group_or_mesh) if env.hierarchical_comm() else None
    return Ranks(group, mesh_of(cp_group_or_mesh), per_node)


def make_key(
    mask: AttnMask,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    ranks: Ranks,
    config: DistAttnConfig,
    pad_size: int | None,
    chunk_size: int | None,
    is_same_source: bool,
    is_q_permutable: bool,
    is_k_permutable: bool,
    layout_key: DistAttnRuntimeKey | None,
    keeps_dispatch: bool = False,
    companions: tuple[tuple[AttnMask, float], ...] = (),
) -> DistAttnRuntimeKey:
    """Check, name, plan (unless the plan is cached) and remember. Arguments as in `magi_attn_flex_key`."""
    with telling_peers(ranks.group):
        num_heads_q, num_heads_kv, head_dim = checks.check_heads(num_heads_q, num_heads_kv, head_dim)
        if env.sanity_check():
            mask.validate()
        key = DistAttnRuntimeKey(
            mask=mask,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            cp_group=ranks.group,
            config=_with_chunk_size(config, chunk_size),
            requested_pad_size=(0 if pad_size is None else checks.as_int("pad_size", pad_size)) or None,
            min_chunks_per_rank=env.min_chunks_per_rank(),
            is_same_source=checks.as_flag("is_same_source", is_same_source),
            is_q_permutable=checks.as_flag("is_q_permutable", is_q_permutable),
            is_k_permutable=checks.as_flag("is_k_permutable", is_k_permutable),
            layout_key=layout_key,
            keeps_dispatch=keeps_dispatch,
            moves_queries=env.qo_comm(),
            ranks_per_node=ranks.per_node,
            companions=companions,
            cp_mesh=ranks.mesh,
        )
    return planned(key)


def _with_chunk_size(config: DistAttnConfig, chunk_size: int | None) -> DistAttnConfig:
    if not isinstance(config, DistAttnConfig):
        raise ValueError(
            f"dist_attn_config must be a DistAttnConfig, which holds a DispatchConfig and an OverlapConfig, got {config!r}"
        )
    if chunk_size is None:
        return config
    chunk_size = checks.as_int("chunk_size", chunk_size, least=1, what="a positive int or None")
    given = config.dispatch_config.chunk_size
    if given is not None and given != chunk_size:
        raise ValueError(
            f"chunk_size is given twice and differently: {chunk_size} as an argument and {given} in DispatchConfig; give it once"
        )
    return dataclasses.replace(
        config, dispatch_config=dataclasses.replace(config.dispatch_config, chunk_size=chunk_size)
    )


def pick_backend(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> Backend:
    """The kernel for these inputs, as the environment asks."""
    return pick(q, k, v, settings, name=env.backend())
