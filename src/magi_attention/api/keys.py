"""Where a user's arguments, the environment and the cache meet: the making of keys."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from magi_attention import env
from magi_attention.comm import assert_same_plan, tell_refusal
from magi_attention.config import DistAttnConfig
from magi_attention.kernels.interface import AttnSettings, Backend
from magi_attention.kernels.registry import pick
from magi_attention.mask import AttnMask
from magi_attention.runtime import cache, checks
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.session import Session, open_session


def make_key(
    mask: AttnMask,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    group: dist.ProcessGroup | None,
    ranks_per_node: int | None,
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
    with telling_peers(group):
        num_heads_q, num_heads_kv, head_dim = checks.check_heads(num_heads_q, num_heads_kv, head_dim)
        if env.sanity_check():
            mask.validate()
        key = DistAttnRuntimeKey(
            mask=mask,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            cp_group=group,
            config=_with_chunk_size(config, chunk_size),
            pad_size=(0 if pad_size is None else checks.as_int("pad_size", pad_size)) or None,
            min_chunks_per_rank=env.min_chunks_per_rank(),
            is_same_source=checks.as_flag("is_same_source", is_same_source),
            is_q_permutable=checks.as_flag("is_q_permutable", is_q_permutable),
            is_k_permutable=checks.as_flag("is_k_permutable", is_k_permutable),
            layout_key=layout_key,
            keeps_dispatch=keeps_dispatch,
            moves_queries=env.qo_comm(),
            ranks_per_node=ranks_per_node,
            companions=companions,
        )
        session = _find_or_open(key)
        digest = _digest(session) if env.sanity_check() else None
    if digest is not None:
        assert_same_plan(digest, group)
    # The very value that the plan was made for, whose handle compiled code may know.
    cache.note_most_recent(session.key)
    return session.key


@contextmanager
def telling_peers(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Under sanity checks, what a rank refuses in here is told to the others, which would else wait for it to compare plans."""
    try:
        yield
    except Exception:
        if env.sanity_check():
            tell_refusal(group)
        raise


def _find_or_open(key: DistAttnRuntimeKey) -> Session:
    session = cache.find_session(key)
    if session is None:
        layout_session = None if key.layout_key is None else cache.get_session(key.layout_key)
        if layout_session is not None and layout_session.key.cp_group is not key.cp_group:
            raise ValueError("layout_key must be a key of the same cp_group_or_mesh; make one for this group")
        session = open_session(key, layout_session)
        cache.put_session(session, env.dist_attn_runtime_dict_size())
    return session


def _digest(session: Session) -> bytes:
    """Of what the ranks must have in common for their exchanges to fit: the plan, the heads, and how partial results travel."""
    key = session.key
    widths = (key.num_heads_q, key.num_heads_kv, key.head_dim)
    travel = (env.forward_high_precision_reduce(), env.backward_high_precision_reduce(), env.dsink_all_reduce_op())
    return hashlib.sha256(session.plan.digest() + repr((widths, travel)).encode()).digest()


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
    return pick(q, k, v, settings, name="reference" if env.sdpa_backend() else env.backend())
