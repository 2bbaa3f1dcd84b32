"""Row sums of ``out * dout``, what every backward needs: ``delta`` of `Backend.backward`."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from magi_attention.kernels.precision import accumulation_dtype

# Elements that a CPU converts and multiplies at a time, a thread: what it makes of them stays in its cache. All at once is up to three
# tensors in fresh memory, and took 5 to 12 times as long.
_CPU_BLOCK = 1 << 18


def row_dots(out: Tensor, dout: Tensor) -> Tensor:
    """``sum(out * dout, -1)``: ``[num_q, hq, dv]`` twice, each of any floating dtype, to ``[num_q, hq]`` in the accumulation dtype."""
    wide = accumulation_dtype(out.dtype)
    if out.device.type == "cuda" and wide.itemsize == 4 and _has_triton():
        from magi_attention.kernels.triton.row_dots import row_dots_on_device

        return row_dots_on_device(out, dout)
    dots = torch.empty(out.shape[:2], dtype=wide, device=out.device)
    length = len(out)
    if out.device.type == "cpu":
        length = _CPU_BLOCK * torch.get_num_threads() // max(1, out.shape[1] * out.shape[2])
    length = max(1, length)
    for start in range(0, len(out), length):
        block = slice(start, start + length)
        torch.sum(out[block].to(wide) * dout[block].to(wide), dim=-1, out=dots[block])
    return dots


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
