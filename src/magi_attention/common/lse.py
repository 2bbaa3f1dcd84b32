"""Merging attention over some keys with attention over others, by their log-sum-exps.

With ``l = log(exp(l_a) + exp(l_b))``: ``out = out_a * exp(l_a - l) + out_b * exp(l_b - l)``, each weighted by its keys' share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite_lse(lse: Tensor) -> Tensor:
    """``lse`` with 0 in place of ``-inf``, so that ``exp(x - lse)`` is 0, not NaN, where both are ``-inf``."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def merge_partial_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Add the keys of ``other_*`` to those of ``out`` and ``lse``, in place.

    ``out``, ``other_out``: ``[num_q, num_heads, head_dim]``, each normalised by its own lse, ``out`` in the accumulation dtype.
    ``lse``, ``other_lse``: ``[num_q, num_heads]``, natural log. Either may be ``-inf`` (its out is then 0); where both are, the row stays 0
    and ``-inf``.
    """
    merged = torch.logaddexp(lse, other_lse)
    base = finite_lse(merged)
    out.mul_(torch.exp(lse - base).unsqueeze(-1))
    out.add_(other_out * torch.exp(other_lse - base).unsqueeze(-1))
    lse.copy_(merged)
