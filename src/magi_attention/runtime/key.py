"""The value that names a plan: equal on equal arguments, hashable, safe to keep for the whole training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from weakref import WeakValueDictionary

import torch.distributed as dist

from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask

_by_handle: WeakValueDictionary[int, DistAttnRuntimeKey] = WeakValueDictionary()
_handles = count()


@dataclass(frozen=True)
class DistAttnRuntimeKey:
    """Everything that a plan depends on. Made by `magi_attn_flex_key` and `magi_attn_varlen_key`.

    Attributes:
        mask: what is attended, in unpadded global coordinates.
        num_heads_q, num_heads_kv, head_dim: of the tensors that `calc_attn` will be given.
        cp_group: the process group over which the sequence is spread; None is one rank without torch.distributed.
        config: dispatch and overlap settings, with the chunk size that was asked for.
        pad_size: padding rows of q that were asked for; None where they are computed.
        min_chunks_per_rank: how many chunks a rank gets at least where no chunk size was asked for.
        is_same_source, is_q_permutable, is_k_permutable: see `magi_attn_flex_key`.
        layout_key: the key whose dispatch this one keeps (a second mask), or whose q layout a side that is not permutable takes.
        keeps_dispatch: with a layout_key, whether both sides are laid out as it lays them out.
        moves_queries: whether queries may move instead of keys (MAGI_ATTENTION_QO_COMM); None: where it is plain.
        companions: masks and weights (this key's among them) that one dispatch serves; see `magi_attn_joint_keys`.
        handle: this value's number in this process, by which operators of torch, which take numbers and tensors alone, know it.
        ranks_per_node: given, keys cross between nodes once (MAGI_ATTENTION_HIERARCHICAL_COMM on a 2-D mesh).
    """

    mask: AttnMask
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    cp_group: dist.ProcessGroup | None
    config: DistAttnConfig
    pad_size: int | None = None
    min_chunks_per_rank: int = 8
    is_same_source: bool = True
    is_q_permutable: bool = True
    is_k_permutable: bool = True
    layout_key: DistAttnRuntimeKey | None = field(default=None, repr=False)
    keeps_dispatch: bool = False
    moves_queries: bool | None = False
    ranks_per_node: int | None = None
    companions: tuple[tuple[AttnMask, float], ...] = field(default=(), repr=False)
    handle: int = field(default_factory=_handles.__next__, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _by_handle[self.handle] = self

    @property
    def cp_size(self) -> int:
        return 1 if self.cp_group is None else dist.get_world_size(self.cp_group)

    @property
    def cp_rank(self) -> int:
        return 0 if self.cp_group is None else dist.get_rank(self.cp_group)

    @property
    def total_seqlen_q(self) -> int:
        return self.mask.num_q

    @property
    def total_seqlen_k(self) -> int:
        return self.mask.num_k


def key_of_handle(handle: int) -> DistAttnRuntimeKey | None:
    """The key of that `handle`; None where it is gone."""
    return _by_handle.get(handle)
