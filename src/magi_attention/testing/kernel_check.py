"""One kernel call against the oracle: what the kernel suite and the benchmarks' correctness runs share.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from magi_attention.kernels.interface import AttnSettings, Backend, KernelMask
from magi_attention.mask.bands import shift, split_k
from magi_attention.testing.mask_families import MASK_FAMILIES, Slices
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result


@dataclass(frozen=True)
class KernelCase:
    """What to compute. ``family`` names one of `MASK_FAMILIES`; ``magnitude`` scales q, and so the logits."""

    family: str = "varlen_causal"
    dtype: torch.dtype = torch.float32
    num_tokens: int = 193
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    softcap: float = 0.0
    softmax_scale: float | None = None
    magnitude: float = 1.0
    seed: int = 0
    deterministic: bool = True

    @property
    def slices(self) -> Slices:
        return MASK_FAMILIES[self.family](self.num_tokens)

    @property
    def settings(self) -> AttnSettings:
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        return AttnSettings(
            softmax_scale=scale, softcap=self.softcap, deterministic=self.deterministic, return_max_logits=True
        )


@dataclass(frozen=True)
class KernelInputs:
    """``q`` ``[num_q, hq, d]``, ``k`` ``[num_k, hk, d]``, ``v`` ``[num_k, hk, dv]``, ``dout`` ``[num_q, hq, dv]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def clone(self) -> KernelInputs:
        return KernelInputs(self.q.clone(), self.k.clone(), self.v.clone(), self.dout.clone())


def make_inputs(case: KernelCase, device: torch.device | str = "cpu") -> KernelInputs:
    """Normal numbers, the same for the same case on every device."""
    slices, dv = case.slices, case.head_dim_v or case.head_dim
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, case.dtype)

    return KernelInputs(
        q=normal(slices.num_q, case.num_heads_q, case.head_dim, scale=case.magnitude),
        k=normal(slices.num_k, case.num_heads_kv, case.head_dim),
        v=normal(slices.num_k, case.num_heads_kv, dv),
        dout=normal(slices.num_q, case.num_heads_q, dv),
    )


@dataclass(frozen=True)
class Truth:
    """``oracle``: in float64. ``plain``: by PyTorch in the precision of the inputs, which sets the tolerance."""

    oracle: AttnResult
    plain: AttnResult

    def check(self, actual: AttnResult) -> None:
        """AssertionError where a field of ``actual`` that is not None is further off than the tolerance rule allows."""
        assert_results_as_exact(actual, self.oracle, self.plain)


def find_truth(case: KernelCase, inputs: KernelInputs) -> Truth:
    tensors = (inputs.q, inputs.k, inputs.v, case.slices.dense().to(inputs.q.device))
    settings = case.settings
    options = {"dout": inputs.dout, "softmax_scale": settings.softmax_scale, "softcap": settings.softcap}
    return Truth(attention_oracle(*tensors, **options), plain_result(*tensors, **options))  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def solve(case: KernelCase, device: torch.device | str = "cpu") -> tuple[KernelInputs, Truth]:
    """Inputs of a case and what comes of them; kept for the next backend that is asked the same. Not to be modified."""
    inputs = make_inputs(case, device)
    return inputs, find_truth(case, inputs)


def row_statistics(out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    """``(lse, delta)`` ``[num_q, hq]`` as a backward is given them: those of the forward over all keys, in the accumulation dtype.

    The forward's own lse, not the oracle's: where logits are large, its rounding is what makes ``exp(s - lse)`` sum to one.
    """
    return lse, (out.to(lse.dtype) * inputs.dout.to(lse.dtype)).sum(dim=-1)


def run_kernel(backend: Backend, inputs: KernelInputs, mask: KernelMask, settings: AttnSettings) -> AttnResult:
    """Forward and backward of ``backend``, results in the accumulation dtype."""
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    out, lse, max_logits = backend.forward(q, k, v, mask, settings)
    grads = backend.backward(dout, q, k, v, *row_statistics(out, lse, inputs), mask, settings)
    return AttnResult(out, lse, max_logits, *grads)


def check_kernel(backend: Backend, case: KernelCase, device: torch.device | str = "cpu") -> None:
    """AssertionError unless forward and backward of one case are as exact as the tolerance rule asks."""
    inputs, truth = solve(case, device)
    truth.check(run_kernel(backend, inputs, case.slices.kernel_mask(), case.settings))


def key_parts(mask: KernelMask, cuts: list[int]) -> list[tuple[slice, KernelMask]]:
    """The mask over the keys between one cut and the next, in their own coordinates."""
    parts = []
    for start, end in zip([0, *cuts], [*cuts, mask.num_k], strict=True):
        bands, _, _ = split_k(mask.bands, np.array([start]), np.array([end]))
        parts.append((slice(start, end), KernelMask(shift(bands, 0, -start), mask.num_q, end - start)))
    return parts
