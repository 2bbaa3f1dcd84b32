"""``delta`` of `Backend.backward`: what every backward needs of the gradients of ``out`` and ``lse``.

With P the probabilities and S the scores, the gradient of ``out`` gives
``dS = P * (dP - sum(out * dout, -1))``, and that of ``lse`` gives ``dS = P * dlse``, because P is
the derivative of ``lse`` by S. Both together are ``P * (dP - delta)`` with
``delta = sum(out * dout, -1) - dlse``. A sink has a probability and no value (its dP is 0), so the
same ``delta`` gives its gradient, see `functional.sink`.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import torch
from torch import Tensor

from magi_attention.kernels.precision import accumulation_dtype

# Elements that a CPU converts and multiplies at a time, a thread: what it makes of them stays in its cache. All at once is up to three
# tensors in fresh memory, and took 5 to 12 times as long.
_CPU_BLOCK = 1 << 18


def row_deltas(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Tensor:
    """``sum(out * dout, -1) - dlse``: ``[num_q, hq]`` in the accumulation dtype; ``dlse`` None where lse is not used.

    ``out``, ``dout``: ``[num_q, hq, dv]``; ``lse``, ``dlse``: ``[num_q, hq]``. It is 0 where lse is
    ``-inf``, whatever dout and dlse hold.
    """
    delta = row_dots(out, dout)
    # A loss such as lse.square() has the gradient -inf where lse is -inf.
    return delta if dlse is None else delta.sub_(dlse).masked_fill_(lse == -math.inf, 0.0)


def row_dots(out: Tensor, dout: Tensor) -> Tensor:
    """``sum(out * dout, -1)``, ``[num_q, hq]`` in the accumulation dtype, of two ``[num_q, hq, dv]`` of any floating dtypes.

    A row whose ``out`` is all 0 gives 0 whatever dout holds, NaN and inf included. These are the rows
    that attend nothing, with or without a sink, and rows whose values are 0, where 0 is right too.
    """
    wide = accumulation_dtype(out.dtype)
    if out.device.type == "cuda" and wide.itemsize == 4 and _has_triton():
        from magi_attention.kernels.triton.row_dots import row_dots_on_device

        return row_dots_on_device(out, dout)
    dots = torch.empty(out.shape[:2], dtype=wide, device=out.device)
    on_cpu = out.device.type == "cpu"
    length = _CPU_BLOCK * torch.get_num_threads() // max(1, out.shape[1] * out.shape[2]) if on_cpu else len(out)
    length = max(1, length)
    for start in range(0, len(out), length):
        block = slice(start, start + length)
        torch.sum(out[block].to(wide) * dout[block].to(wide), dim=-1, out=dots[block])
    # 0 * dout is 0 or NaN. On a CPU, one sum tells that no row is NaN; elsewhere that would wait for
    # the device.
    if not on_cpu or math.isnan(dots.sum().item()):
        dots.masked_fill_((out == 0).all(dim=-1), 0.0)
    return dots


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
