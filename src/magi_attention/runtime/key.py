"""The value that names a plan: equal on equal arguments, hashable, safe to keep for the whole training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch.distributed as dist

from magi_attention.common import AttnRanges
from magi_attention.common.enum import AttnMaskType
from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Taking the next handle, registering a key and looking one up are one step each, so threads need no lock here.
_by_handle: WeakValueDictionary[int, DistAttnRuntimeKey] = WeakValueDictionary()
_handles = count()
_UNBOUND = -1


@dataclass(frozen=True)
class DistAttnRuntimeKey:
    """Everything that a plan depends on. Made by `magi_attn_flex_key` and `magi_attn_varlen_key`.

    A pickled key carries plain data: no process group, no mesh and no handle. Loaded, it is unbound, and whatever uses it raises a
    ValueError until `bind` has been called. (``torch.load`` takes it with ``weights_only=False``.) Copies (``copy.copy``,
    ``copy.deepcopy``) are the key itself, with its group.

    Attributes:
        mask: what is attended, in unpadded global coordinates.
        num_heads_q, num_heads_kv, head_dim: of the tensors that `calc_attn` will be given.
        cp_group: the process group over which the sequence is spread; None is one rank without torch.distributed.
        config: dispatch and overlap settings, with the chunk size that was asked for.
        requested_pad_size: padding rows of q that were asked for; None where they are computed.
        min_chunks_per_rank: how many chunks a rank gets at least where no chunk size was asked for.
        is_same_source, is_q_permutable, is_k_permutable: see `magi_attn_flex_key`.
        layout_key: the key whose dispatch this one keeps (a second mask), or whose q layout a side that is not permutable takes.
        keeps_dispatch: with a layout_key, whether both sides are laid out as it lays them out.
        moves_queries: whether queries may move instead of keys (MAGI_ATTENTION_QO_COMM); None: only where few queries attend many keys.
        ranks_per_node: given, keys cross between nodes once (MAGI_ATTENTION_HIERARCHICAL_COMM on a 2-D mesh).
        companions: masks and weights (this key's among them) that one dispatch serves; see `magi_attn_joint_keys`.
        cp_mesh: the DeviceMesh that was passed for ``cp_group``; None where a group was passed, or nothing.
        is_bound: False for a key that came by pickle.
        handle: this value's number in this process, by which operators of torch, which take only numbers and tensors, know it.
        layout_in_use: ``(pad_size, chunk_size)`` of the plan; None before there is one.
        num_local_rows: rows of this rank on the q side and on the k side, padding included; None before there is a plan.
    """

    mask: AttnMask
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    cp_group: dist.ProcessGroup | None
    config: DistAttnConfig
    requested_pad_size: int | None = None
    min_chunks_per_rank: int = 8
    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True
    layout_key: DistAttnRuntimeKey | None = field(default=None, repr=False)
    keeps_dispatch: bool = False
    moves_queries: bool | None = False
    ranks_per_node: int | None = None
    companions: tuple[tuple[AttnMask, float], ...] = field(default=(), repr=False)
    cp_mesh: DeviceMesh | None = field(default=None, repr=False)
    is_bound: bool = True
    handle: int = field(default_factory=_handles.__next__, init=False, compare=False, repr=False)
    layout_in_use: tuple[int, int] | None = field(default=None, init=False, compare=False, repr=False)
    num_local_rows: tuple[int, int] | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _by_handle[self.handle] = self

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self) if one.compare))

    def __hash__(self) -> int:
        return self._hash

    def __copy__(self) -> DistAttnRuntimeKey:
        return self

    def __deepcopy__(self, memo: Any) -> DistAttnRuntimeKey:
        return self

    def __getstate__(self) -> dict[str, Any]:
        arguments = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        unbound = {"cp_group": None, "cp_mesh": None, "is_bound": False, "handle": _UNBOUND}
        return {**arguments, **unbound, "layout_in_use": self.layout_in_use}

    def bind(self, group: dist.ProcessGroup | DeviceMesh | None = None) -> DistAttnRuntimeKey:
        """This key over the ranks of a group of this process: planned, unless that plan is cached. Every rank of the group calls it.

        Args:
            group: as ``cp_group_or_mesh`` of `magi_attn_varlen_key`; omitted, the default group, or one rank where torch.distributed is
                not initialised.

        Returns:
            A bound key; this one, if it is bound to that group already. What the maker's environment said of the plan is kept.

        Raises:
            ValueError: a group that this rank is not in, or on which the key's arguments do not fit (say, a ``pad_size``).
        """
        from magi_attention.runtime.planned import bind  # which is written in terms of this class

        return bind(self, group)

    def check_bound(self) -> None:
        """ValueError for a key that came by pickle."""
        if not self.is_bound:
            raise _unbound()

    @property
    def cp_size(self) -> int:
        """Number of ranks over which the sequence is spread."""
        self.check_bound()
        return 1 if self.cp_group is None else dist.get_world_size(self.cp_group)

    @property
    def cp_rank(self) -> int:
        """This process's rank in ``cp_group``."""
        self.check_bound()
        return 0 if self.cp_group is None else dist.get_rank(self.cp_group)

    @property
    def total_seqlen_q(self) -> int:
        """Queries, unpadded."""
        return self.mask.num_q

    @property
    def total_seqlen_k(self) -> int:
        """Keys, unpadded."""
        return self.mask.num_k

    @property
    def q_ranges(self) -> AttnRanges:
        """Query ranges of the mask's slices; they attend the same cells as those that were given, and may be cut differently."""
        return AttnRanges.from_ranges(self.mask.to_slices()[0].tolist())

    @property
    def k_ranges(self) -> AttnRanges:
        """Key ranges of the mask's slices, one for each of ``q_ranges``."""
        return AttnRanges.from_ranges(self.mask.to_slices()[1].tolist())

    @property
    def attn_mask_type(self) -> tuple[AttnMaskType, ...]:
        """Types of the mask's slices, one for each of ``q_ranges``."""
        return tuple(AttnMaskType.from_int_type(one) for one in self.mask.to_slices()[2].tolist())

    @property
    def dist_attn_config(self) -> DistAttnConfig:
        """``config``, under the name of its argument."""
        return self.config

    @property
    def pad_size(self) -> int:
        """Padding rows of q in use."""
        return self._layout[0]

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk in use on the q side."""
        return self._layout[1]

    @property
    def _layout(self) -> tuple[int, int]:
        if self.layout_in_use is None:
            raise ValueError(
                "this key has no plan, and so no pad_size and chunk_size; make keys with magi_attn_flex_key"
            )
        return self.layout_in_use


def key_of_handle(handle: int) -> DistAttnRuntimeKey | None:
    """The key of that `handle`; None where it is gone.

    Raises:
        ValueError: the handle is that of a key that came by pickle.
    """
    if handle == _UNBOUND:
        raise _unbound()
    return _by_handle.get(handle)


def _unbound() -> ValueError:
    return ValueError(
        "this key came by pickle, so it is bound to no process group and has no plan here: call key.bind(group) on every rank of the "
        "group, and use the key that it returns"
    )
