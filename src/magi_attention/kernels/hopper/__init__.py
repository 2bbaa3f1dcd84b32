"""The backend for Hopper GPUs (sm_90), in Gluon: warp-specialised, with the tensor copy engine and asynchronous products.

It takes bfloat16 and float16 heads of 64 or 128 columns, without softcap; ``triton`` takes the rest. The fused backward adds up dq in the
order in which blocks come: deterministic backwards are left to ``triton``'s kernels, and so are masks on the device of too many slices.
Gluon has no interpreter, so without such a GPU these kernels can be compiled but not run.

NaN and infinity go further here than in ``triton``: a masked probability of 0 is multiplied by all
rows of its tile, and 0 * NaN is NaN. NaN in a row of k or v can reach queries of another document
that share a tile with a query that attends the row; NaN in q or dout can reach keys likewise.
``MAGI_ATTENTION_BACKEND=triton`` keeps it within its slice.

Probabilities in the backward are not capped at 1: a cap costs 4.5 % of its rate on an H200. Where
logits are beyond about 1e7, float32 rounds them by 1 and more, and gradients can be too large or
infinite; ``MAGI_ATTENTION_BACKEND=triton`` caps them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from magi_attention.common.launch import Launcher
from magi_attention.kernels import triton as portable
from magi_attention.kernels.hopper.backward import backward_kernel
from magi_attention.kernels.hopper.configs import BACKWARD_TILES, CONSUMER_ROWS, FORWARD_TILES, HEAD_DIMS, NUM_CONSUMERS
from magi_attention.kernels.hopper.descriptors import MOST_PLACES, describe_rows, why_not
from magi_attention.kernels.hopper.device_segments import build_device_segments, fits
from magi_attention.kernels.hopper.forward import forward_kernel
from magi_attention.kernels.hopper.segments import SegmentList, build_segments
from magi_attention.kernels.hopper.statistics import statistics_by_head
from magi_attention.kernels.hopper.walks import choose_walk
from magi_attention.kernels.interface import AttnSettings, DeviceMask, KernelMask, Partial
from magi_attention.kernels.partials import empty_partial
from magi_attention.kernels.triton.configs import arch_of
from magi_attention.kernels.triton.work_lists import transpose

name = "hopper"

_DTYPES = (torch.bfloat16, torch.float16)
_LOG2E = 1.4426950408889634
_launch_forward = Launcher(forward_kernel)
_launch_backward = Launcher(backward_kernel)


def unsupported(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
    if q.device.type != "cuda" or arch_of(q.device) != "sm_90":
        return f"it runs on Hopper GPUs (sm_90), got tensors on {q.device}"
    if q.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in HEAD_DIMS:
        return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]} and {v.shape[-1]}"
    if settings.softcap > 0:
        return f"it takes no softcap, got {settings.softcap}"
    if settings.softmax_scale <= 0:
        return f"it takes positive softmax scales, got {settings.softmax_scale}"
    if q.shape[0] * q.shape[1] > MOST_PLACES // 2:
        return f"it takes up to 2**30 rows of queries, all heads together, got {q.shape[0]} x {q.shape[1]}"
    return why_not("q", q) or why_not("k", k) or why_not("v", v)


def _segments(mask: KernelMask, tile: int, block: int, device: torch.device, *, by_key: bool) -> SegmentList:
    at = ("hopper", tile, block, device, by_key)
    if at not in mask.derived:
        length = mask.num_k if by_key else mask.num_q
        if isinstance(mask, DeviceMask):
            bands = portable.device_bands(mask)
            mask.derived[at] = build_device_segments(bands, length, tile, block, by_key=by_key)
        else:
            table = transpose(mask.bands) if by_key else mask.bands
            mask.derived[at] = build_segments(table, length, tile, block).to(device)
    segments: SegmentList = mask.derived[at]
    return segments


def _finds_room(mask: KernelMask, length: int, tile: int) -> bool:
    """Whether its segments can be listed without waiting for the device to count them."""
    return not isinstance(mask, DeviceMask) or fits(len(mask.q_ranges), length, tile)


@lru_cache(maxsize=16)
def _num_programs(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KernelMask,
    settings: AttnSettings,
    *,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
) -> Partial:
    """See `Backend.forward`."""
    (num_q, hq, d), group = q.shape, q.shape[1] // k.shape[1]
    raw = settings.return_max_logits
    rows = CONSUMER_ROWS * NUM_CONSUMERS
    if not _finds_room(mask, num_q, rows):
        return portable.forward(q, k, v, mask, settings, into=into, out_dtype=out_dtype)
    if portable.attends_nothing(mask) or not q.numel():
        return into or empty_partial(q, d, out_dtype, with_max_logits=raw)
    tiles = FORWARD_TILES[d]
    work = _segments(mask, rows, tiles.block, q.device, by_key=False)
    if into is None:
        out = torch.empty(num_q, hq, d, dtype=out_dtype or torch.float32, device=q.device)
        lse = torch.empty(num_q, hq, dtype=torch.float32, device=q.device)
    else:
        assert into.out.is_contiguous() and into.lse.is_contiguous(), "partial results are made contiguous"
        out, lse = into.out, into.lse
    tops = torch.empty(work.num_tiles * NUM_CONSUMERS, hq, dtype=torch.float32, device=q.device) if raw else lse
    by_copy = into is None and out.dtype == q.dtype
    num_items, programs = work.num_tiles * hq, _num_programs(q.device)
    # So many heads that they occupy all programs for a while, and so few that their keys and values stay in the L2 cache.
    at_once = max(2 * group, -(-4 * programs // work.num_tiles))
    arguments = (
        describe_rows(q, CONSUMER_ROWS), describe_rows(k, tiles.block), describe_rows(v, tiles.block),
        describe_rows(out, CONSUMER_ROWS) if by_copy else out, lse, tops, work.order, work.rows, work.segments,
        q.stride(1), k.stride(1), v.stride(1), num_q, settings.softmax_scale * _LOG2E, num_items, hq, at_once, group,
    )  # fmt: skip
    constants = {
        "D": d, "BLOCK": tiles.block, "STAGES": tiles.stages, "CONSUMERS": NUM_CONSUMERS, "TMA_OUT": by_copy,
        "MERGE": into is not None, "RAW": raw, "TURNS": tiles.turns, "REGISTERS": tiles.registers,
    }  # fmt: skip
    _launch_forward(min(num_items, programs), q.device, arguments, constants, num_warps=4)
    if not raw:
        return Partial(out, lse, None if into is None else into.max_logits)
    best = tops.amax(dim=0) / _LOG2E
    if into is not None and into.max_logits is not None:
        torch.maximum(into.max_logits, best, out=into.max_logits)
        best = into.max_logits
    return Partial(out, lse, best)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: KernelMask,
    settings: AttnSettings,
    *,
    dq: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`."""
    keys = CONSUMER_ROWS * NUM_CONSUMERS
    if settings.deterministic or not _finds_room(mask, k.shape[0], keys):
        return portable.backward(dout, q, k, v, lse, delta, mask, settings, dq=dq, grad_dtype=grad_dtype)
    grad_dtype = grad_dtype or torch.float32
    (num_k, hk, d), hq = k.shape, q.shape[1]
    dk, dv = (torch.empty(x.shape, dtype=grad_dtype, device=x.device) for x in (k, v))
    if portable.attends_nothing(mask) or not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=grad_dtype, device=q.device) if dq is None else dq, dk.zero_(), dv.zero_()
    wide_dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if dq is None else dq
    assert wide_dq.is_contiguous(), "accumulated gradients are made contiguous"
    dout = dout.to(q.dtype)
    dout = dout if why_not("dout", dout) is None else dout.contiguous()
    tiles = BACKWARD_TILES[d]
    d_lse, d_delta, length = statistics_by_head(lse.contiguous(), delta.contiguous(), tiles.block)
    work = _segments(mask, keys, tiles.block, q.device, by_key=True)
    at_once, in_step = choose_walk(work, hk, hq // hk, _num_programs(q.device))
    arguments = (
        describe_rows(q, tiles.block), describe_rows(k, keys), describe_rows(v, keys), describe_rows(dout, tiles.block),
        d_lse, d_delta, describe_rows(wide_dq, CONSUMER_ROWS, tiles.dq_columns(d)), dk, dv,
        work.order, work.rows, work.segments, q.stride(1), k.stride(1), v.stride(1), dout.stride(1), length, num_k,
        settings.softmax_scale, settings.softmax_scale * _LOG2E, hk, at_once, _num_programs(q.device), hq // hk,
    )  # fmt: skip
    constants = {
        "D": d, "BLOCK": tiles.block, "STAGES": tiles.stages, "IN_STEP": in_step and tiles.in_step, "REGISTERS": tiles.registers,
    }  # fmt: skip
    _launch_backward(work.num_tiles * hk, q.device, arguments, constants, num_warps=4)
    return wide_dq.to(grad_dtype) if dq is None else dq, dk, dv
