"""From a key to one that has a plan: where keys, the cache and the planner meet."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist

from magi_attention import env
from magi_attention.comm import assert_same_plan, tell_refusal
from magi_attention.runtime import cache
from magi_attention.runtime.group import mesh_of, nodes_of, resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.session import Session, open_session

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("magi_attention")


def planned(key: DistAttnRuntimeKey) -> DistAttnRuntimeKey:
    """The key, equal to ``key``, whose plan is cached; it is planned now if there is none. Every rank of its group calls this.

    The result is the very value that the plan was made for, whose handle compiled code may know.
    """
    with telling_peers(key.cp_group):
        session = _find_or_open(key)
        digest = _digest(session) if env.sanity_check() else None
    if digest is not None:
        assert_same_plan(digest, key.cp_group)
    cache.note_most_recent(session.key)
    return session.key


def bind(key: DistAttnRuntimeKey, cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> DistAttnRuntimeKey:
    """See `DistAttnRuntimeKey.bind`."""
    group, mesh = resolve_group(cp_group_or_mesh), mesh_of(cp_group_or_mesh)
    per_node = key.ranks_per_node
    with telling_peers(group):
        if per_node is not None and mesh is not None and mesh.ndim == 2:
            per_node = nodes_of(mesh)
    layout_key = None if key.layout_key is None else bind(key.layout_key, cp_group_or_mesh)
    bound = dataclasses.replace(
        key, cp_group=group, cp_mesh=mesh, ranks_per_node=per_node, layout_key=layout_key, is_bound=True
    )
    return planned(bound)


@contextmanager
def telling_peers(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Under sanity checks, tell the other ranks of an error in here; otherwise they would wait for this rank to compare plans."""
    try:
        yield
    except Exception:
        if env.sanity_check():
            tell_refusal(group)
        raise


def _find_or_open(key: DistAttnRuntimeKey) -> Session:
    session = cache.find_session(key)
    if session is not None:
        return session
    layout_session = None if key.layout_key is None else cache.get_session(key.layout_key)
    if layout_session is not None and layout_session.key.cp_group is not key.cp_group:
        raise ValueError("layout_key must be a key of the same cp_group_or_mesh; make one for this group")
    start = time.perf_counter()
    session = open_session(key, layout_session)
    plan, layout = session.plan, session.plan.q_layout
    logger.info(
        "planned %s queries and %s keys over %s ranks in %.1f ms: chunks of %s, %s remote stages",
        *(f"{count:,}" for count in (key.total_seqlen_q, key.total_seqlen_k, plan.num_ranks)),
        (time.perf_counter() - start) * 1e3,
        f"{layout.chunk_size:,}",
        plan.num_stages,
    )
    # The one field that is known only now. No other thread has seen the key yet.
    object.__setattr__(key, "layout_in_use", (int(layout.pad_size), int(layout.chunk_size)))
    return cache.put_session(session, env.dist_attn_runtime_dict_size())


def _digest(session: Session) -> bytes:
    """Of what the ranks must have in common for their exchanges to fit: the plan, the heads, and in which dtypes rows travel."""
    key = session.key
    widths = (key.num_heads_q, key.num_heads_kv, key.head_dim)
    travel = (env.forward_high_precision_reduce(), env.backward_high_precision_reduce(), env.precision())
    return hashlib.sha256(session.plan.digest() + repr((widths, travel, env.dsink_all_reduce_op())).encode()).digest()
