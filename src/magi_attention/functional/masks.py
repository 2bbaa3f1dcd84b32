"""The kernel's mask of the tables that a call gives, kept for the calls that give the same ones.

Tables on the CPU are read and checked. Those on another device are left there, so that the host does not wait for it: what they say is then
clamped, not checked, unless ``MAGI_ATTENTION_SANITY_CHECK`` asks for all checks, at the price of waiting.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from magi_attention import env
from magi_attention.common.tensor_kinds import as_constant, for_keeping
from magi_attention.functional.checks import read_slices
from magi_attention.kernels.interface import DeviceMask, KernelMask
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import bands_from_slices, check_disjoint, empty_bands

Tables = tuple[Tensor, Tensor, Tensor | None]

# Masks kept for tables on a device that share one q_ranges.
_MOST_KEPT = 4


def kernel_mask(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int, num_k: int) -> KernelMask:
    """The mask of tables that `check_tables` has let pass.

    Raises:
        ValueError: where they are read: ranges that are reversed or out of bounds, an unknown type; under
            ``MAGI_ATTENTION_SANITY_CHECK``, a cell listed twice.
    """
    if q_ranges.device.type == "cpu" or env.sanity_check():
        tables = read_slices(q_ranges, k_ranges, types, num_q, num_k)
        mask = _host_mask(*(table.tobytes() for table in tables), num_q, num_k)
        if env.sanity_check():
            check_disjoint(mask.bands)
        return mask
    if not len(q_ranges):
        return KernelMask(empty_bands(), num_q, num_k)
    return _device_mask(q_ranges, k_ranges, types, num_q, num_k)


def as_saveable(*tables: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tables``; where gradients are on, those made under `torch.inference_mode` are copied.

    Autograd does not save tensors of inference mode. Each call copies: writes to such a tensor are
    not counted, so a kept copy could be out of date.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tables
    return tuple(table.clone() if table is not None and table.is_inference() else table for table in tables)


@lru_cache(maxsize=16)
def _host_mask(q_ranges: bytes, k_ranges: bytes, types: bytes, num_q: int, num_k: int) -> KernelMask:
    """The mask of int64 tables given as bytes. The layers of a model ask for the same few masks over and over."""
    q_table, k_table, type_table = (np.frombuffer(table, np.int64) for table in (q_ranges, k_ranges, types))
    bands = bands_from_slices(q_table.reshape(-1, 2), k_table.reshape(-1, 2), type_table)
    return KernelMask(bands, num_q, num_k)


@dataclass(frozen=True)
class _Kept:
    """A mask, and what it was made of: ``others`` k_ranges and types, ``key`` the rest."""

    others: tuple[weakref.ref[Tensor] | None, ...]
    key: tuple[Any, ...]
    mask: DeviceMask


# By q_ranges, the tensor itself; gone when it is.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _device_mask(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int, num_k: int) -> DeviceMask:
    """The mask of the very tensors of an earlier call, if nothing was written to them since, with the lists that were made of it."""
    others = (k_ranges, types)
    tables = (q_ranges, k_ranges) if types is None else (q_ranges, k_ranges, types)
    if any(table.is_inference() for table in tables) or is_capturing(q_ranges.device):
        # Writes to these are not counted; a graph must make its lists anew whenever it is replayed.
        return _new_mask(q_ranges, k_ranges, types, num_q, num_k)
    key = (num_q, num_k, _stream(q_ranges.device), *(table._version for table in tables))
    kept: tuple[_Kept, ...] = _kept.get(q_ranges, ())
    for one in kept:
        if one.key == key and _are(one.others, others):
            return one.mask
    mask = _new_mask(q_ranges, k_ranges, types, num_q, num_k)
    entry = _Kept(tuple(None if table is None else weakref.ref(table) for table in others), key, mask)
    _kept[q_ranges] = (*kept[1 - _MOST_KEPT :], entry)
    return mask


def _new_mask(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int, num_k: int) -> DeviceMask:
    """Of other tensors of the same memory, so that what is kept for a tensor does not keep it."""
    return DeviceMask(q_ranges.detach(), k_ranges.detach(), None if types is None else types.detach(), num_q, num_k)


def _are(references: tuple[weakref.ref[Tensor] | None, ...], tables: tuple[Tensor | None, ...]) -> bool:
    return all(
        table is None if reference is None else table is not None and reference() is table
        for reference, table in zip(references, tables, strict=True)
    )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is made of what is launched now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """What is made on one stream must not be used on another without waiting."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


# By the identity of a mask: itself, weakly, and its tables on each device. Gone when it is.
_tables: dict[int, tuple[weakref.ref[AttnMask], dict[torch.device, Tables]]] = {}


def tables_of_mask(mask: AttnMask, num_q: int, num_k: int, device: torch.device) -> Tables:
    """``(q_ranges, k_ranges, attn_type_map)`` of a mask, made once for each mask and device.

    Raises:
        ValueError: no mask, or one of other lengths.
    """
    if not isinstance(mask, AttnMask):
        raise ValueError(f"mask must be an AttnMask, got a {type(mask).__name__}; ranges are q_ranges and k_ranges")
    if (mask.num_q, mask.num_k) != (num_q, num_k):
        raise ValueError(
            f"the mask must be of as many queries and keys as q and k have tokens, {num_q} and {num_k}, got one of {mask.num_q} and "
            f"{mask.num_k}"
        )
    key = id(mask)
    found = _tables.get(key)
    if found is None or found[0]() is not mask:
        found = (weakref.ref(mask, lambda _: _tables.pop(key, None)), {})
        _tables[key] = found
    by_device = found[1]
    if device not in by_device:
        with for_keeping():
            by_device[device] = tuple(torch.from_numpy(table.astype(np.int32)).to(device) for table in mask.to_slices())  # type: ignore[assignment]
    return tuple(as_constant(table) for table in by_device[device])  # type: ignore[return-value,arg-type]
