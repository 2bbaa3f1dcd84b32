"""Row statistics as the backward's copies want them: by head, in units of log 2, with an end that takes no part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from magi_attention.common.launch import Launcher
from magi_attention.kernels.hopper.descriptors import Tiles

STATISTICS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_QUERIES, _HEADS = 64, 16


@triton.jit
def _by_head_kernel(
    p_lse, p_delta, p_lse_by_head, p_delta_by_head, num_q, num_heads, length,
    QUERIES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(length, QUERIES)
    o_q = tl.program_id(0) % num_blocks * QUERIES + tl.arange(0, QUERIES)
    o_h = tl.program_id(0) // num_blocks * HEADS + tl.arange(0, HEADS)
    m_given = (o_q < num_q)[:, None] & (o_h < num_heads)[None, :]
    p_given = o_q.to(tl.int64)[:, None] * num_heads + o_h[None, :]
    b_lse = tl.load(p_lse + p_given, mask=m_given, other=float("-inf"))
    b_delta = tl.load(p_delta + p_given, mask=m_given, other=0.0)
    # exp2(s - inf) is 0: what rows without any key, and rows behind the last, must give.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * 1.4426950408889634)
    p_made = o_h.to(tl.int64)[None, :] * length + o_q[:, None]
    m_made = (o_q < length)[:, None] & (o_h < num_heads)[None, :]
    tl.store(p_lse_by_head + p_made, b_lse, mask=m_made)
    tl.store(p_delta_by_head + p_made, b_delta, mask=m_made)


_launch = Launcher(_by_head_kernel)


def statistics_by_head(lse: Tensor, delta: Tensor, block: int) -> tuple[Tiles, Tiles, int]:
    """``lse``, ``delta``: ``[num_q, hq]`` float32, contiguous. Returns what copies of ``block`` numbers read, and a head's length there.

    The lse is in units of log 2, and infinite where it was ``-inf`` and in the ``block`` numbers behind each head's last.
    """
    num_q, num_heads = lse.shape
    length = -(-(num_q + block) // 4) * 4  # so that the second table begins at a multiple of 16 bytes
    made = torch.empty(2, num_heads * length, dtype=torch.float32, device=lse.device)
    lse_by_head, delta_by_head = made[0], made[1]
    _launch(
        triton.cdiv(length, _QUERIES) * triton.cdiv(num_heads, _HEADS), lse.device,
        (lse, delta, lse_by_head, delta_by_head, num_q, num_heads, length), {"QUERIES": _QUERIES, "HEADS": _HEADS},
    )  # fmt: skip
    return (
        Tiles(lse_by_head, [num_heads * length], [1], [block], STATISTICS_LAYOUT),
        Tiles(delta_by_head, [num_heads * length], [1], [block], STATISTICS_LAYOUT),
        length,
    )
