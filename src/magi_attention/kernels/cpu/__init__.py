"""The backend for CPUs: a C++ kernel, built by the system's compiler on first use.

Memory beyond inputs and outputs: forward, a few MiB a thread; backward, about as much, a dq in float32 where it is asked for in
q's dtype and is a sum for some query (not for documents that fit a block of 256 keys), dq, dk and dv in float32 where they are asked
for in a third dtype, and buffers for dq that are at most three times its size in float32 (next to none for masks of documents or of
a window). Same inputs give the same bits, whatever the number of threads, which follows `torch.set_num_threads`.

bfloat16 is multiplied as such where the processor does that (AVX-512 and NEON with bfloat16), with sums in float32; elsewhere, like
float16 everywhere, it is widened to float32. Where it is multiplied as such, numbers below its smallest normal one (1.2e-38) may count
as 0, in inputs and in results.

Where there is no compiler, or it fails, the tiled torch version serves and a warning says so, once.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from magi_attention.common.tensor_kinds import address
from magi_attention.kernels import tiled
from magi_attention.kernels.cpu.build import load_library
from magi_attention.kernels.interface import AttnSettings, KernelMask, Partial
from magi_attention.kernels.partials import empty_partial

name = "cpu"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Problem(ctypes.Structure):
    _fields_ = [
        ("q", _View),
        ("k", _View),
        ("v", _View),
        *((field, ctypes.c_int64) for field in ("num_q", "num_k", "hq", "hk", "d", "dv")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("bands", ctypes.c_void_p),
        ("num_bands", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _ForwardOutput(ctypes.Structure):
    _fields_ = [
        *((field, ctypes.c_void_p) for field in ("out_wide", "out_narrow", "lse", "max_logits")),
        ("merge", ctypes.c_int32),
    ]


class _BackwardInput(ctypes.Structure):
    _fields_ = [
        ("dout", _View),
        ("dout_dtype", ctypes.c_int32),
        *((field, ctypes.c_void_p) for field in ("lse", "delta", "dq", "dk", "dv")),
        ("narrow", ctypes.c_int32),
        ("add_to_dq", ctypes.c_int32),
    ]


def unsupported(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
    if q.device.type != "cpu":
        return f"it runs on CPU tensors, got tensors on {q.device}"
    if q.dtype not in _DTYPES and _library() is not None:
        return f"it takes float32, bfloat16 and float16, got {q.dtype}"
    return tiled.unsupported(q, k, v, settings) if _library() is None else None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return load_library()


def _view(x: Tensor) -> _View:
    return _View(address(x), x.stride(0), x.stride(1))


def _bands(mask: KernelMask) -> np.ndarray:
    bands: np.ndarray = mask.derived.setdefault("cpu bands", np.ascontiguousarray(mask.bands, dtype=np.int64))
    return bands


def _problem(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask, settings: AttnSettings) -> _Problem:
    bands = _bands(mask)
    (num_q, hq, d), (num_k, hk, dv) = q.shape, v.shape
    return _Problem(
        *(_view(x) for x in (q, k, v)),
        *(num_q, num_k, hq, hk, d, dv),
        settings.softmax_scale,
        settings.softcap,
        bands.ctypes.data,
        len(bands),
        _DTYPES[q.dtype],
        torch.get_num_threads(),
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else address(x)


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
    library = _library()
    if library is None:
        return tiled.forward(q, k, v, mask, settings, into=into, out_dtype=out_dtype)
    out_dtype = out_dtype or torch.float32
    if not len(mask.bands) or not q.numel():
        return into or empty_partial(q, v.shape[2], out_dtype, with_max_logits=settings.return_max_logits)
    if into is not None and not all(x is None or x.is_contiguous() for x in into):
        return tiled.forward(q, k, v, mask, settings, into=into)
    result = into
    if result is None:
        result = Partial(
            torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=out_dtype if out_dtype == q.dtype else torch.float32),
            torch.empty(q.shape[:2], dtype=torch.float32),
            torch.empty(q.shape[1], dtype=torch.float32) if settings.return_max_logits else None,
        )
    wide = result.out.dtype == torch.float32
    output = _ForwardOutput(
        _address(result.out) if wide else None,
        None if wide else _address(result.out),
        _address(result.lse),
        _address(result.max_logits),
        into is not None,
    )
    problem = _problem(q, k, v, mask, settings)
    _check(library.magi_cpu_forward(ctypes.byref(problem), ctypes.byref(output)))
    return result if into is not None else result._replace(out=result.out.to(out_dtype))


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
    library = _library()
    if library is None:
        return tiled.backward(dout, q, k, v, lse, delta, mask, settings, dq=dq, grad_dtype=grad_dtype)
    grad_dtype = grad_dtype or torch.float32
    narrow = dq is None and grad_dtype == q.dtype  # else gradients are computed in float32, and converted here
    written = q.dtype if narrow else torch.float32
    dk, dv = (torch.empty(x.shape, dtype=written) for x in (k, v))
    own_dq = torch.empty(q.shape, dtype=written) if dq is None or not dq.is_contiguous() else dq
    if not len(mask.bands) or not q.numel() or not k.numel():
        for x in (dk, dv) if own_dq is dq else (dk, dv, own_dq):
            x.zero_()
    else:
        if dout.dtype not in (torch.float32, q.dtype) or (dout.stride(-1) != 1 and dout.shape[-1] > 1):
            dout = dout.to(torch.float32).contiguous()
        lse, delta = lse.contiguous(), delta.contiguous()
        given = _BackwardInput(
            _view(dout),
            _DTYPES[dout.dtype],
            *(_address(x) for x in (lse, delta, own_dq, dk, dv)),
            narrow and q.dtype != torch.float32,
            own_dq is dq,
        )
        problem = _problem(q, k, v, mask, settings)
        _check(library.magi_cpu_backward(ctypes.byref(problem), ctypes.byref(given)))
    if dq is None:
        return own_dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)
    if own_dq is not dq:
        dq += own_dq
    return dq, dk.to(grad_dtype), dv.to(grad_dtype)


def _check(status: int) -> None:
    if status:
        raise MemoryError(
            "the CPU attention kernel could not allocate its working memory; see this module for how much that is"
        )
