"""Sessions by key, least recently used first, for every group apart."""

from __future__ import annotations

from collections import OrderedDict

import torch.distributed as dist

from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.session import Session

_sessions: dict[dist.ProcessGroup | None, OrderedDict[DistAttnRuntimeKey, Session]] = {}
_most_recent: dict[dist.ProcessGroup | None, DistAttnRuntimeKey] = {}


def find_session(key: DistAttnRuntimeKey) -> Session | None:
    """What stands behind ``key``, which becomes the most recently used of its group; None if nothing does."""
    sessions = _sessions.get(key.cp_group)
    if sessions is None or key not in sessions:
        return None
    sessions.move_to_end(key)
    return sessions[key]


def get_session(key: DistAttnRuntimeKey) -> Session:
    """As `find_session`.

    Raises:
        ValueError: ``key`` is no key, was evicted, or was made in another process.
    """
    if not isinstance(key, DistAttnRuntimeKey):
        raise ValueError(
            f"key must be a DistAttnRuntimeKey made by magi_attn_flex_key or magi_attn_varlen_key, got {key!r}"
        )
    session = find_session(key)
    if session is None:
        raise ValueError(
            "no plan stands behind this key: it was evicted from the cache (MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE newer keys "
            "were made for its group, or clear_cache was called), or it was made in another process. Make it again with "
            "magi_attn_flex_key or magi_attn_varlen_key on every rank"
        )
    return session


def put_session(session: Session, max_sessions: int) -> None:
    """Keep ``session``, and at most ``max_sessions`` of its group."""
    sessions = _sessions.setdefault(session.key.cp_group, OrderedDict())
    sessions[session.key] = session
    while len(sessions) > max_sessions:
        sessions.popitem(last=False)


def note_most_recent(key: DistAttnRuntimeKey) -> None:
    _most_recent[key.cp_group] = key


def most_recent_key(group: dist.ProcessGroup | None) -> DistAttnRuntimeKey:
    """The key made last for ``group``.

    Raises:
        ValueError: none was made.
    """
    if group not in _most_recent:
        raise ValueError("no key was made for this group yet; make one with magi_attn_flex_key or magi_attn_varlen_key")
    return _most_recent[group]


def clear_sessions(group: dist.ProcessGroup | None, *, all_groups: bool) -> None:
    """Forget the keys of ``group``, or of every group."""
    for store in (_sessions, _most_recent):
        if all_groups:
            store.clear()
        else:
            store.pop(group, None)
