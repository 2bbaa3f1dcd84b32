"""Merging attention over some keys with attention over others, by their log-sum-exps.

Shapes: num_q tokens, hq query heads, dv head dim of v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magi_attention.kernels.interface import Partial
from magi_attention.kernels.precision import accumulation_dtype


def finite_lse(lse: Tensor) -> Tensor:
    """``lse`` with 0 in place of ``-inf``, so that ``exp(x - lse)`` is 0, not NaN, where both are ``-inf``."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def empty_partial(
    q: Tensor, head_dim_v: int, out_dtype: torch.dtype | None = None, *, with_max_logits: bool
) -> Partial:
    """What queries ``q`` ``[num_q, hq, d]`` get from no keys, the neutral element of `merge_`: ``out`` 0, the rest ``-inf``.

    ``out_dtype`` left out is the accumulation dtype.
    """
    (num_q, hq, _), wide = q.shape, accumulation_dtype(q.dtype)
    out = torch.zeros(num_q, hq, head_dim_v, dtype=out_dtype or wide, device=q.device)
    lse = torch.full((num_q, hq), -math.inf, dtype=wide, device=q.device)
    max_logits = torch.full((hq,), -math.inf, dtype=wide, device=q.device) if with_max_logits else None
    return Partial(out, lse, max_logits)


def merge_(into: Partial, other: Partial) -> Partial:
    """Add the keys of ``other`` to those of ``into``, in place; returns ``into``.

    ``into.out`` is in the accumulation dtype. With ``l`` the merged lse, ``out = out_a * exp(l_a - l) + out_b * exp(l_b - l)``. Either
    lse may be ``-inf`` (its out is then 0); where both are, the row stays 0 and ``-inf``.
    """
    lse = torch.logaddexp(into.lse, other.lse)
    base = finite_lse(lse)
    into.out.mul_(torch.exp(into.lse - base).unsqueeze(-1))
    into.out.add_(other.out * torch.exp(other.lse - base).unsqueeze(-1))
    into.lse.copy_(lse)
    if into.max_logits is not None and other.max_logits is not None:
        torch.maximum(into.max_logits, other.max_logits, out=into.max_logits)
    return into
