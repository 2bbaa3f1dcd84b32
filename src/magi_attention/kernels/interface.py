"""What a one-device attention kernel is given and must give back.

Shapes: num_q, num_k tokens; hq, hk heads of queries and of keys/values (hq % hk == 0); d, dv head dims of q/k and of v.
The accumulation dtype is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from magi_attention.mask.bands import bands_from_slices


@dataclass(frozen=True)
class AttnSettings:
    """How the logits are made: ``s = softmax_scale * q.k``, then ``softcap * tanh(s / softcap)`` where softcap > 0.

    Raises:
        ValueError: numbers that would make every logit NaN.
    """

    softmax_scale: float
    softcap: float = 0.0
    deterministic: bool = False
    return_max_logits: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.softmax_scale):
            raise ValueError(
                f"softmax_scale must be a finite number, or None for 1 / sqrt(head_dim), got {self.softmax_scale}"
            )
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be 0 (none) or positive and finite, got {self.softcap}")


@dataclass(frozen=True, eq=False)
class KernelMask:
    """What one kernel call attends: rows of a band table, in the coordinates of the q and k rows it is given.

    ``bands``: ``[n, 6]`` int64 rows ``(q0, q1, k0, k1, lo, hi)``. Cell ``(i, j)`` is attended when some row has
    ``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <= hi``. Rows are tight (see ``mask.bands``), so none is empty,
    and their cells are disjoint. ``derived`` holds what a backend computes from the table once (work lists, device copies),
    under keys that begin with the backend's name; it never changes a result.
    """

    bands: np.ndarray
    num_q: int
    num_k: int
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)


class DeviceMask(KernelMask):
    """A mask whose slices lie on a device and change from call to call.

    ``q_ranges``, ``k_ranges``: ``[n, 2]`` int32, half-open; ``types``: ``[n]`` int32 (0 full, 1 causal, 2 inv_causal, 3 bi_causal), or
    None: all full. Their numbers have not been looked at: a backend that reads them there must stay within the tensors whatever they
    say. For all others ``bands`` is the table on the host, which waits for the device, once.
    """

    q_ranges: Tensor
    k_ranges: Tensor
    types: Tensor | None

    def __init__(self, q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int, num_k: int) -> None:
        assert len(q_ranges), "without slices there is nothing to read on the device"
        values: dict[str, Any] = {
            "q_ranges": q_ranges,
            "k_ranges": k_ranges,
            "types": types,
            "num_q": num_q,
            "num_k": num_k,
            "derived": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def bands(self) -> np.ndarray:  # type: ignore[override]
        if "bands" not in self.derived:
            q_ranges, k_ranges = (
                np.clip(table.cpu().numpy().astype(np.int64), 0, length)
                for table, length in ((self.q_ranges, self.num_q), (self.k_ranges, self.num_k))
            )
            types = np.zeros(len(q_ranges), np.int64) if self.types is None else self.types.cpu().numpy() & 3
            self.derived["bands"] = bands_from_slices(q_ranges, k_ranges, types)
        bands: np.ndarray = self.derived["bands"]
        return bands


class Partial(NamedTuple):
    """Attention over some of the keys: enough to merge it with attention over the others.

    ``out``: ``[num_q, hq, dv]``, normalised by its own lse. ``lse``: ``[num_q, hq]`` in the accumulation dtype, natural log,
    ``-inf`` (and out 0) where a query attends nothing. ``max_logits``: ``[hq]`` in lse's dtype, or None: the largest scaled logit,
    before softcap; ``-inf`` where the head attends nothing.
    """

    out: Tensor
    lse: Tensor
    max_logits: Tensor | None


class Backend(Protocol):
    """A kernel module. Inputs may have any strides with a contiguous last axis; they are never modified."""

    name: str

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
        """Why this backend cannot take such inputs, in words for the user, or None if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: KernelMask,
        settings: AttnSettings,
        *,
        into: Partial | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Partial:
        """Attend ``q`` ``[num_q, hq, d]`` to ``k`` ``[num_k, hk, d]``, ``v`` ``[num_k, hk, dv]``.

        With ``into`` (``out`` in the accumulation dtype), the result is merged into it in place and it is returned.
        Else ``out`` is made in ``out_dtype`` (None: the accumulation dtype).
        """
        ...

    def backward(
        self,
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
        """Gradients ``(dq, dk, dv)`` of these cells, given the lse over *all* cells (sinks included).

        ``dout``: ``[num_q, hq, dv]`` in q's or the accumulation dtype. ``lse``, ``delta``: ``[num_q, hq]`` in the accumulation dtype;
        ``delta = sum(out * dout, -1) - dlse``, see `kernels.row_dots`. Probabilities are ``exp(s - lse)``, and 0 in rows whose lse
        is ``-inf``.
        With ``dq`` (accumulation dtype) the gradient of q is added to it in place; the others, and dq without it, are made
        in ``grad_dtype`` (None: the accumulation dtype).
        """
        ...
