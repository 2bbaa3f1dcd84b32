"""The backend for GPUs, in Triton: any that Triton supports; in its interpreter, CPU tensors too.

Forward and backward walk per-tile work lists of the band table, built once a mask and cached in it; of a `DeviceMask` they are built on
the device, and the host does not wait for it. Every output row has one owner: no
atomics, the same bits for the same inputs. Products of float32 inputs are IEEE unless
``torch.backends.cuda.matmul.allow_tf32`` asks for TF32.

NaN and infinity in a row stay in the slices that hold it: in k or v, they may reach any query of such a slice, attended or not; in q or
dout, the gradients of any key of it. They never reach queries or keys of other slices that share a tile with it. At logits so large that
float32 cannot tell neighbours apart (from about 1e6), probabilities in the backward are at most 1 but may be too small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magi_attention.common.launch import Launcher
from magi_attention.kernels.interface import AttnSettings, DeviceMask, KernelMask, Partial
from magi_attention.kernels.partials import empty_partial
from magi_attention.kernels.triton.backward import dkdv_kernel, dq_kernel
from magi_attention.kernels.triton.configs import KernelTiles, Tiles, arch_of, padded, pick_tiles
from magi_attention.kernels.triton.device_lists import build_device_bands, build_device_list
from magi_attention.kernels.triton.forward import forward_kernel
from magi_attention.kernels.triton.interpreter import is_interpreted
from magi_attention.kernels.triton.work_lists import WorkList, build_work_list, transpose

name = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COLUMNS = 256
_LOG2E = 1.4426950408889634
_launch_forward = Launcher(forward_kernel)
_launch_dkdv = Launcher(dkdv_kernel)
_launch_dq = Launcher(dq_kernel)


def unsupported(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
    if q.device.type != "cuda" and not is_interpreted():
        return f"it runs on GPUs, got tensors on {q.device}"
    if q.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _MOST_COLUMNS:
        return f"it takes head dims up to {_MOST_COLUMNS}, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def _tiles(q: Tensor, v: Tensor) -> KernelTiles:
    return pick_tiles(q.shape[-1], v.shape[-1], q.element_size(), arch_of(q.device))


def _work_list(mask: KernelMask, tile: int, block: int, device: torch.device, *, by_key: bool) -> WorkList:
    at = ("triton", tile, block, device, by_key)
    if at not in mask.derived:
        length = mask.num_k if by_key else mask.num_q
        if isinstance(mask, DeviceMask):
            mask.derived[at] = build_device_list(device_bands(mask), length, tile, block, by_key=by_key)
        else:
            bands = transpose(mask.bands) if by_key else mask.bands
            mask.derived[at] = build_work_list(bands, length, tile, block).to(device)
    work: WorkList = mask.derived[at]
    return work


def device_bands(mask: DeviceMask) -> Tensor:
    """`build_device_bands` of a mask, made once."""
    if "triton bands" not in mask.derived:
        mask.derived["triton bands"] = build_device_bands(
            mask.q_ranges, mask.k_ranges, mask.types, mask.num_q, mask.num_k
        )
    bands: Tensor = mask.derived["triton bands"]
    return bands


def attends_nothing(mask: KernelMask) -> bool:
    """Whether that is known without asking the device."""
    return not isinstance(mask, DeviceMask) and not len(mask.bands)


def _lists(work: WorkList) -> tuple[Tensor, ...]:
    return work.order, work.inner_rows, work.inner, work.edge_rows, work.edges


def _scales(settings: AttnSettings) -> tuple[float, float]:
    """What raw scores are multiplied by, and what the capped ones are, both towards logits in units of log 2."""
    if settings.softcap > 0:
        return settings.softmax_scale / settings.softcap, settings.softcap * _LOG2E
    return settings.softmax_scale * _LOG2E, 0.0


def _precision(q: Tensor) -> str:
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _shared(q: Tensor, v: Tensor, hk: int, tiles: Tiles, settings: AttnSettings) -> dict[str, Any]:
    d, dv = q.shape[-1], v.shape[-1]
    block_d, block_dv = (padded(columns, q.element_size(), arch_of(q.device)) for columns in (d, dv))
    return {
        "GROUP": q.shape[1] // hk,
        "D": d,
        "DV": dv,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "TILE_Q": tiles.q,
        "TILE_K": tiles.k,
        "CAPPED": settings.softcap > 0,
        "PRECISION": _precision(q),
    }


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


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
    (num_q, hq, _), (num_k, hk, dv) = q.shape, v.shape
    raw = settings.return_max_logits
    if attends_nothing(mask) or not q.numel():
        return into or empty_partial(q, dv, out_dtype, with_max_logits=raw)
    tiles = _tiles(q, v).forward
    work = _work_list(mask, tiles.q, tiles.k, q.device, by_key=False)
    if into is None:
        out = torch.empty(num_q, hq, dv, dtype=out_dtype or torch.float32, device=q.device)
        lse = torch.empty(num_q, hq, dtype=torch.float32, device=q.device)
    else:
        assert into.out.is_contiguous() and into.lse.is_contiguous(), "partial results are made contiguous"
        out, lse = into.out, into.lse
    tops = torch.empty(work.num_tiles, hq, dtype=torch.float32, device=q.device) if raw else lse
    scale, cap = _scales(settings)
    arguments = (
        q, k, v, out, lse, tops, *_lists(work),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), num_q, num_k, scale, cap, hq,
    )  # fmt: skip
    constants = {"RAW": raw, "MERGE": into is not None, **_shared(q, v, hk, tiles, settings)}
    _launch_forward(work.num_tiles * hq, q.device, arguments, constants, **_options(tiles))
    if not raw:
        return Partial(out, lse, None if into is None else into.max_logits)
    # Uncapped logits were kept in units of log 2, those before a cap in units of it.
    best = tops.amax(dim=0) * (settings.softcap if settings.softcap > 0 else 1 / _LOG2E)
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
    grad_dtype = grad_dtype or torch.float32
    (num_q, hq, _), (num_k, hk, dv_columns) = q.shape, v.shape
    if attends_nothing(mask) or not q.numel() or not k.numel():
        dq = torch.zeros(q.shape, dtype=grad_dtype, device=q.device) if dq is None else dq
        dk, dv = (torch.zeros(x.shape, dtype=grad_dtype, device=x.device) for x in (k, v))
        return dq, dk, dv
    add = dq is not None
    if dq is None:
        dq = torch.empty(q.shape, dtype=grad_dtype, device=q.device)
    assert dq.is_contiguous(), "accumulated gradients are made contiguous"
    dk, dv = (torch.empty(x.shape, dtype=grad_dtype, device=x.device) for x in (k, v))
    dout = dout.to(q.dtype)
    dout = dout if dout.stride(-1) == 1 or dv_columns == 1 else dout.contiguous()
    lse, delta = lse.contiguous(), delta.contiguous()
    tiles, (scale, cap) = _tiles(q, v), _scales(settings)
    given = (q, k, v, dout, lse, delta)
    strides = tuple(x.stride(axis) for x in (q, k, v, dout) for axis in (0, 1))
    numbers = (num_q, num_k, settings.softmax_scale, scale, cap)

    by_key = _work_list(mask, tiles.dkdv.k, tiles.dkdv.q, q.device, by_key=True)
    arguments: tuple[Any, ...] = (*given, dk, dv, *_lists(by_key), *strides, *numbers, hk)
    constants = _shared(q, v, hk, tiles.dkdv, settings)
    _launch_dkdv(by_key.num_tiles * hk, q.device, arguments, constants, **_options(tiles.dkdv))
    by_query = _work_list(mask, tiles.dq.q, tiles.dq.k, q.device, by_key=False)
    arguments = (*given, dq, *_lists(by_query), *strides, *numbers, hq)
    constants = {"ADD": add, **_shared(q, v, hk, tiles.dq, settings)}
    _launch_dq(by_query.num_tiles * hq, q.device, arguments, constants, **_options(tiles.dq))
    return dq, dk, dv
