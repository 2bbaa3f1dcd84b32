"""Row sums of ``out * dout``, what every backward needs: ``delta`` of `Backend.backward`."""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from magi_attention.kernels.precision import accumulation_dtype


def row_dots(out: Tensor, dout: Tensor) -> Tensor:
    """``sum(out * dout, -1)``: ``[num_q, hq, dv]`` twice, each of any floating dtype, to ``[num_q, hq]`` in the accumulation dtype."""
    wide = accumulation_dtype(out.dtype)
    if out.device.type == "cuda" and wide.itemsize == 4 and _has_triton():
        from magi_attention.kernels.triton.row_dots import row_dots_on_device

        return row_dots_on_device(out, dout)
    return (out.to(wide) * dout.to(wide)).sum(dim=-1)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
