"""Managers, kept for programs already written: a key with its functions as methods, and the plan cache as a dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from magi_attention.api.moving import calc_attn, dispatch, get_position_ids, roll, undispatch
from magi_attention.common.enum import AttnRole
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.runtime import cache
from magi_attention.runtime.group import resolve_group
from magi_attention.runtime.key import DistAttnRuntimeKey

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class DistAttnRuntimeMgr:
    """A key, and what is done with it. Each method is the function of `magi_attention.api` that it names, with ``key`` given."""

    key: DistAttnRuntimeKey

    def dispatch_qo(self, q_or_o: Tensor) -> Tensor:
        """`dispatch` of the q side."""
        return dispatch(q_or_o, self.key)

    def dispatch_kv(self, k_or_v: Tensor) -> Tensor:
        """`dispatch` of the k side."""
        return dispatch(k_or_v, self.key, attn_role=AttnRole.KEY)

    def undispatch_qo(self, q_or_o: Tensor, is_partial_grad: bool = False) -> Tensor:
        """`undispatch` of the q side."""
        return undispatch(q_or_o, self.key, is_partial_grad)

    def undispatch_kv(self, k_or_v: Tensor, is_partial_grad: bool = False) -> Tensor:
        """`undispatch` of the k side."""
        return undispatch(k_or_v, self.key, is_partial_grad, attn_role=AttnRole.KEY)

    def roll(self, x: Tensor, shift: int, dim: int) -> Tensor:
        """`roll` of the q side."""
        return roll(x, shift, dim, self.key)

    roll_simple = roll

    def calc_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        return_max_logits: bool = False,
    ) -> tuple[Tensor, AttnForwardMeta]:
        """`calc_attn`."""
        return calc_attn(q, k, v, self.key, sink, softmax_scale, softcap, return_max_logits)

    def get_position_ids(self, attn_role: AttnRole = AttnRole.QUERY) -> Tensor:
        """`get_position_ids`."""
        return get_position_ids(self.key, attn_role=attn_role)


class DistAttnRuntimeDictManager:
    """The plan cache, by key. A view: plans enter it where keys are made, and MAGI_ATTENTION_DIST_ATTN_RUNTIME_DICT_SIZE bounds it."""

    def get(self, key: DistAttnRuntimeKey, default: Any = None) -> Any:
        """The `DistAttnRuntimeMgr` of a key whose plan is cached, and ``default`` for another. Counts as a use of the plan."""
        session = cache.find_session(key) if isinstance(key, DistAttnRuntimeKey) else None
        return default if session is None else DistAttnRuntimeMgr(session.key)

    def __getitem__(self, key: DistAttnRuntimeKey) -> DistAttnRuntimeMgr:
        manager = self.get(key)
        if manager is None:
            raise KeyError(key)
        return manager  # type: ignore[no-any-return]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, DistAttnRuntimeKey) and key in cache.keys_of(key.cp_group)

    def keys(self, cp_group: dist.ProcessGroup | DeviceMesh | None = None) -> list[DistAttnRuntimeKey]:
        """The keys of a group (omitted: the default one) whose plans are cached, least recently used first."""
        return cache.keys_of(resolve_group(cp_group))

    def get_most_recent_key(self, cp_group: dist.ProcessGroup | DeviceMesh | None = None) -> DistAttnRuntimeKey:
        """See `magi_attention.api.get_most_recent_key`."""
        return cache.most_recent_key(resolve_group(cp_group))

    def clear(self, cp_group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
        """See `magi_attention.api.clear_cache`."""
        cache.clear_sessions(None if cp_group is None else resolve_group(cp_group), all_groups=cp_group is None)


dist_attn_runtime_dict_mgr = DistAttnRuntimeDictManager()
