"""Tile sizes of the kernels, by head dim, element size and architecture: a static table, so that nothing is tuned at run time.

What each entry costs in registers and shared memory is printed by ``python benchmarks/compile_report.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from magi_attention.kernels.triton.interpreter import is_interpreted


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


def padded(head_dim: int) -> int:
    """The block of columns that holds a head: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pick_tiles(head_dim: int, head_dim_v: int, itemsize: int, arch: str) -> KernelTiles:
    """The tiles for heads of this size. ``arch``: ``sm_90``, ``gfx942``, ... or ``interpreter``."""
    columns = max(padded(head_dim), padded(head_dim_v))
    if arch == "interpreter":
        return KernelTiles(Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1))
    if itemsize == 4:
        rows = 64 if columns <= 64 else 32 if columns <= 128 else 16
        return KernelTiles(Tiles(64, rows, 4, 1), Tiles(rows, rows, 4, 1), Tiles(rows, rows, 4, 1))
    return _TABLE.get(_family(arch), _SMALL_MEMORY)[min(columns, 256) if columns > 64 else 64]


def _family(arch: str) -> str:
    return {"sm_90": "hopper", "sm_100": "hopper", "sm_80": "ampere"}.get(arch, "small")


_HOPPER = {
    64: KernelTiles(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)),
    128: KernelTiles(Tiles(128, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 32, 4, 3)),
    256: KernelTiles(Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 1), Tiles(64, 32, 8, 1)),
}
_AMPERE = {
    64: KernelTiles(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: KernelTiles(Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2)),
    256: KernelTiles(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
# 99 KiB of shared memory a block (sm_86, 89, 120), 64 KiB (gfx942).
_SMALL_MEMORY = {
    64: KernelTiles(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
    128: KernelTiles(Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1)),
    256: KernelTiles(Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)),
}
_TABLE = {"hopper": _HOPPER, "ampere": _AMPERE, "small": _SMALL_MEMORY}


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> str:
    """The architecture of a device, as the table names it."""
    if is_interpreted():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
