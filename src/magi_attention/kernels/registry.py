"""Which kernel serves a call: by name, or by the device and dtype of the tensors."""

from __future__ import annotations

import importlib
from typing import cast

from torch import Tensor

from magi_attention.kernels.interface import AttnSettings, Backend

# Modules are imported when first picked: a backend that is not used costs nothing and may need what is not installed.
BACKENDS: dict[str, str] = {
    "reference": "magi_attention.kernels.reference",
    "tiled": "magi_attention.kernels.tiled",
    "cpu": "magi_attention.kernels.cpu",
    "triton": "magi_attention.kernels.triton",
    "hopper": "magi_attention.kernels.hopper",
}

# What "auto" tries on a device, best first. The last takes anything, so there is always one.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "tiled"), "cuda": ("hopper", "triton", "tiled")}
_PREFERRED_ELSEWHERE = ("tiled",)


def pick(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings, name: str = "auto") -> Backend:
    """The backend ``name``, or with "auto" the best one for these tensors.

    On a CPU, "auto" sends float64 to ``reference`` and all else to ``cpu``; on a CUDA device it takes ``hopper`` where
    that serves them, and else ``triton`` where it can be imported.

    Raises:
        ValueError: no backend of that name, or it cannot be imported here, or it cannot take these tensors.
    """
    if name == "auto":
        return _pick_best(q, k, v, settings)
    backend = load(name)
    reason = backend.unsupported(q, k, v, settings)
    if reason is not None:
        raise ValueError(
            f"the attention backend {name!r} cannot serve this call: {reason}. Use the backend 'auto', or another"
        )
    return backend


def _pick_best(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> Backend:
    if q.device.type == "cpu" and q.element_size() == 8:
        return load("reference")
    reasons = []
    for name in _PREFERRED.get(q.device.type, _PREFERRED_ELSEWHERE):
        if name not in BACKENDS:
            continue
        try:
            backend = load(name)
        except ValueError as error:
            reasons.append(str(error))
            continue
        reason = backend.unsupported(q, k, v, settings)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no attention backend can serve {q.dtype} tensors on {q.device}: {'; '.join(reasons)}")


def load(name: str) -> Backend:
    """The backend of this name, whatever it is to serve. ValueError: there is none, or it cannot be imported here."""
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"there is no attention backend {name!r}; the backends are {known}")
    try:
        return cast(Backend, importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        raise ValueError(f"the attention backend {name!r} cannot be imported here: {error}") from error
