"""`common.lse` inside of kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_lse(b_lse, b_other):
    """``(lse, keep, add)`` of attention over keys of two kinds, given the log-sum-exps of each.

    ``out * keep + other_out * add`` is the merged output; where both lse are ``-inf``, ``lse`` is too, and the weights are 0.
    """
    b_top = tl.maximum(b_lse, b_other)
    b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_keep = tl.exp(b_lse - b_base)
    b_add = tl.exp(b_other - b_base)
    b_sum = b_keep + b_add
    b_some = tl.where(b_sum > 0, b_sum, 1.0)
    return tl.where(b_sum > 0, b_base + tl.log(b_some), b_top), b_keep / b_some, b_add / b_some
