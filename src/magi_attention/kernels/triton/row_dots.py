"""`kernels.row_dots` on a GPU: both tensors are read once, and nothing of their size is made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magi_attention.common.launch import Launcher

# Elements that a program reads of each tensor at a time.
_BLOCK = 4096


def row_dots_on_device(out: Tensor, dout: Tensor) -> Tensor:
    """``[num_q, hq, dv]`` twice, of any strides, to ``[num_q, hq]`` float32."""
    num_q, num_heads, dv = out.shape
    dots = torch.empty(num_q, num_heads, dtype=torch.float32, device=out.device)
    if not dots.numel():
        return dots
    columns = triton.next_power_of_2(max(dv, 1))
    rows = max(1, _BLOCK // columns)
    strides = (*out.stride(), *dout.stride())
    _launch(
        triton.cdiv(dots.numel(), rows), out.device, (out, dout, dots, *strides, dots.numel(), num_heads, dv),
        {"ROWS": rows, "COLUMNS": columns},
    )  # fmt: skip
    return dots


@triton.jit
def _row_dots_kernel(
    p_out, p_dout, p_dots, s_ot, s_oh, s_oc, s_dt, s_dh, s_dc, num_rows, num_heads, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_rows = o_rows < num_rows
    o_q = o_rows // num_heads
    o_h = o_rows % num_heads
    o_c = tl.arange(0, COLUMNS).to(tl.int64)  # a stride times a column may pass 2**31
    m = m_rows[:, None] & (o_c < num_columns)[None, :]
    b_out = tl.load(p_out + (o_q * s_ot + o_h * s_oh)[:, None] + o_c[None, :] * s_oc, mask=m, other=0.0)
    b_dout = tl.load(p_dout + (o_q * s_dt + o_h * s_dh)[:, None] + o_c[None, :] * s_dc, mask=m, other=0.0)
    # 0 * NaN is NaN: a row whose out is all 0 gives 0 whatever dout holds, see `kernels.row_dots`.
    m_some = tl.sum((b_out != 0).to(tl.int32), 1) > 0
    b_dout = tl.where(m_some[:, None], b_dout.to(tl.float32), 0.0)
    tl.store(p_dots + o_rows, tl.sum(b_out.to(tl.float32) * b_dout, 1), mask=m_rows)


_launch = Launcher(_row_dots_kernel)
