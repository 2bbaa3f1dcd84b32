"""What a one-device attention kernel is given and must give back.

Shapes: num_q, num_k tokens; hq, hk heads of queries and of keys/values (hq % hk == 0); d, dv head dims of q/k and of v.
The accumulation dtype is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AttnSettings:
    """How the logits are made: ``s = softmax_scale * q.k``, then ``softcap * tanh(s / softcap)`` where softcap > 0."""

    softmax_scale: float
    softcap: float = 0.0
    deterministic: bool = False
    return_max_logits: bool = False


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
        ``delta = sum(out * dout, -1)``. Probabilities are ``exp(s - lse)``, and 0 in rows whose lse is ``-inf``.
        With ``dq`` (accumulation dtype) the gradient of q is added to it in place; the others, and dq without it, are made
        in ``grad_dtype`` (None: the accumulation dtype).
        """
        ...
