"""Sessions by key, least recently used first, for every group apart. Threads share it: each function here is one step to the others."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import torch.distributed as dist

from magi_attention.runtime.key import DistAttnRuntimeKey, key_of_handle
from magi_attention.runtime.session import Session

_sessions: dict[dist.ProcessGroup | None, OrderedDict[DistAttnRuntimeKey, Session]] = {}
_most_recent: dict[dist.ProcessGroup | None, DistAttnRuntimeKey] = {}
# Held for look-ups, never while planning. Re-entrant, because the garbage collector may run a destructor that clears the cache here.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# A thread that holds the lock while the process forks is not there in the child to release it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def find_session(key: DistAttnRuntimeKey) -> Session | None:
    """The session of ``key``, which becomes the most recently used of its group; None if there is none."""
    with _lock:
        try:
            sessions = _sessions[key.cp_group]
            sessions.move_to_end(key)
            return sessions[key]
        except KeyError:
            return None


def get_session(key: DistAttnRuntimeKey) -> Session:
    """As `find_session`.

    Raises:
        ValueError: ``key`` is no key, came by pickle and is not bound, or was evicted.
    """
    if not isinstance(key, DistAttnRuntimeKey):
        raise ValueError(
            f"key must be a DistAttnRuntimeKey made by magi_attn_flex_key or magi_attn_varlen_key, got {key!r}"
        )
    key.check_bound()
    session = find_session(key)
    if session is None:
        raise ValueError(
            "no plan stands behind this key: it was evicted from the cache (MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE newer keys "
            "were made for its group, or clear_cache was called). Make it again with magi_attn_flex_key or magi_attn_varlen_key on "
            "every rank"
        )
    return session


def put_session(session: Session, max_sessions: int) -> Session:
    """Keep ``session`` as the most recently used, and at most ``max_sessions`` of its group.

    Returns:
        The session that is kept: an earlier one, where another thread has planned an equal key meanwhile.
    """
    evicted = []  # freed after the lock is released
    with _lock:
        sessions = _sessions.setdefault(session.key.cp_group, OrderedDict())
        kept = sessions.setdefault(session.key, session)
        sessions.move_to_end(kept.key)
        while len(sessions) > max_sessions:
            evicted.append(sessions.popitem(last=False))
    return kept


def keys_of(group: dist.ProcessGroup | None) -> list[DistAttnRuntimeKey]:
    """The keys of ``group`` whose plans are cached, least recently used first."""
    with _lock:
        return list(_sessions.get(group, ()))


def note_most_recent(key: DistAttnRuntimeKey) -> None:
    """Let ``key`` be what `most_recent_key` gives."""
    with _lock:
        _most_recent[key.cp_group] = key


def most_recent_key(group: dist.ProcessGroup | None) -> DistAttnRuntimeKey:
    """The key made last for ``group``.

    Raises:
        ValueError: none was made.
    """
    with _lock:
        key = _most_recent.get(group)
    if key is None:
        raise ValueError("no key was made for this group yet; make one with magi_attn_flex_key or magi_attn_varlen_key")
    return key


def clear_sessions(group: dist.ProcessGroup | None, *, all_groups: bool) -> None:
    """Forget the keys of ``group``, or of every group."""
    forgotten: list[object] = []  # freed after the lock is released
    with _lock:
        for store in (_sessions, _most_recent):
            groups = list(store) if all_groups else [group]
            forgotten.extend(store.pop(one, None) for one in groups)


def key_behind(handle: int) -> DistAttnRuntimeKey:
    """The key of ``handle``, which an operator was given. ValueError: there is none."""
    key = key_of_handle(handle)
    if key is None:
        raise ValueError(
            "no plan stands behind this key: it is gone, or it was made in another process. Keep keys for as long as what is compiled with "
            "them runs, or make them again on every rank"
        )
    return key
