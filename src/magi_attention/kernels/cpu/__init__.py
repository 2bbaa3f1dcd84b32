"""The backend for CPUs. Served by the tiled torch version."""

from __future__ import annotations

from torch import Tensor

from magi_attention.kernels.interface import AttnSettings
from magi_attention.kernels.tiled import backward, forward

name = "cpu"

__all__ = ["backward", "forward", "name", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
    return None if q.device.type == "cpu" else f"it runs on CPU tensors, got tensors on {q.device}"
