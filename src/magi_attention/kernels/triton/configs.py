"""Tile sizes of the kernels, by head dim, element size and architecture: a static table, so that nothing is tuned at run time.

What each entry costs in registers and shared memory is printed by ``python benchmarks/compile_report.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from magi_attention.kernels.triton.interpreter import is_interpreted
from magi_attention.kernels.triton.spills import SPILLS, UNALIGNED_SPILLS


@dataclass(frozen=True)
class Tiles:
    """``q`` queries by ``k`` keys a step; ``warps`` of threads, ``stages`` of the software pipeline."""

    q: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class KernelTiles:
    """Tiles of the three kernels."""

    forward: Tiles
    dkdv: Tiles
    dq: Tiles


def padded(head_dim: int, itemsize: int, arch: str) -> int:
    """The block of columns that holds a head: the next power of two, at least 16; in rows of 128 bytes where products read shared memory.

    Narrower rows are swizzled by 32 or 64 bytes there. Of two operands at the same place whose swizzles differ, ptxas (12.8, of Triton
    3.6) took one's descriptors for the other's and computed some of them from a register that nothing had written: wrong results, or an
    address out of range.
    """
    least = 128 // itemsize if _reads_shared_memory(arch) else 16
    return max(least, _next_power_of_two(head_dim))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _reads_shared_memory(arch: str) -> bool:
    """Whether matrix units read their operands through descriptors of shared memory: wgmma and tcgen05."""
    return arch.startswith("sm_") and 90 <= int(arch.removeprefix("sm_")) < 120


def pick_tiles(head_dim: int, head_dim_v: int, itemsize: int, arch: str) -> KernelTiles:
    """The tiles for heads of this size. ``arch``: ``sm_90``, ``gfx942``, ... or ``interpreter``."""
    columns = _columns(head_dim, head_dim_v)
    if arch == "interpreter":
        return KernelTiles(Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1))
    if itemsize == 4:
        return _FLOAT32[columns]
    return _TABLE[_family(arch)][columns]


def most_spilled(arch: str, kernel: str, head_dim: int, head_dim_v: int, itemsize: int, *, aligned: bool = True) -> int:
    """Bytes a thread that the compiler may keep in memory for want of registers, for ``kernel`` forward, dkdv or dq.

    ``aligned``: whether pointers and strides are multiples of 16.
    """
    entry = (kernel, _columns(head_dim, head_dim_v), itemsize)
    return (SPILLS if aligned else UNALIGNED_SPILLS).get(arch, {}).get(entry, 0)


def _columns(head_dim: int, head_dim_v: int) -> int:
    """The row of the table for these heads: the wider block of columns, at least 64."""
    return max(64, _next_power_of_two(head_dim), _next_power_of_two(head_dim_v))


def _family(arch: str) -> str:
    if arch in _FAMILIES:
        return _FAMILIES[arch]
    return "small" if arch.startswith("sm_") else "cdna"


_FAMILIES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "sm_103": "blackwell"}
_HOPPER = {
    64: KernelTiles(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)),
    128: KernelTiles(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 32, 4, 3)),
    256: KernelTiles(Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 1), Tiles(128, 32, 8, 1)),
}
# As Hopper's, but for a forward that fits.
_BLACKWELL = {**_HOPPER, 128: replace(_HOPPER[128], forward=Tiles(128, 64, 8, 3))}
_AMPERE = {
    64: KernelTiles(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: KernelTiles(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
    256: KernelTiles(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
# 99 KiB of shared memory a block (sm_86, 89, 120).
_SMALL_MEMORY = {
    64: KernelTiles(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
    128: KernelTiles(Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 1), Tiles(128, 32, 8, 1)),
    256: KernelTiles(Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)),
}
# 64 KiB (gfx942).
_CDNA = {
    64: KernelTiles(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
    128: KernelTiles(Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1)),
    256: KernelTiles(Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)),
}
# Products of float32 numbers, being IEEE, are made by the ordinary units, whose operands all lie in registers: tiles are small, for any
# architecture.
_FLOAT32 = {
    64: KernelTiles(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    128: KernelTiles(Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
    256: KernelTiles(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1)),
}
_TABLE = {"hopper": _HOPPER, "blackwell": _BLACKWELL, "ampere": _AMPERE, "small": _SMALL_MEMORY, "cdna": _CDNA}


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> str:
    """The architecture of a device, as the table names it."""
    if is_interpreted():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
