"""What the CPU benchmark times: our backend, torch's fused attention, compiled FlexAttention, and the matrix product they are held to.

Each is a dict of calls by name ("forward", "backward"). Making inputs, building masks and compiling are not part of a call.

Shapes: hq, hk heads of queries and of keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_masks import BenchmarkMask
from magi_attention.kernels.interface import AttnSettings, KernelMask
from magi_attention.kernels.registry import load
from magi_attention.kernels.row_dots import row_dots
from magi_attention.mask import AttnMask

NUM_HEADS_Q, NUM_HEADS_KV = 8, 2
GEMM_SIZE = 2048

Call = Callable[[], object]


@dataclass(frozen=True)
class Inputs:
    """``q``, ``dout`` ``[tokens, hq, head_dim]``; ``k``, ``v`` ``[tokens, hk, head_dim]``: normal numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def random(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(num_heads: int) -> Tensor:
            return torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)

        return Inputs(normal(NUM_HEADS_Q), normal(NUM_HEADS_KV), normal(NUM_HEADS_KV), normal(NUM_HEADS_Q))

    def by_heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``q, k, v, dout`` as ``[1, heads, tokens, head_dim]``, contiguous, as torch's own attention likes them."""
        q, k, v, dout = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (self.q, self.k, self.v, self.dout))
        return q, k, v, dout


def products_are_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies ``dtype`` faster than it does float32."""
    if dtype == torch.float32:
        return True
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        features = set()
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16"})


def gemm(dtype: torch.dtype) -> tuple[Call, float]:
    """``(call, FLOPs)`` of a large matrix product in ``dtype``, or in float32 where the CPU has no products of ``dtype``."""
    used = dtype if products_are_native(dtype) else torch.float32
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(used) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * GEMM_SIZE**3


def ours(mask: AttnMask, x: Inputs) -> dict[str, Call]:
    """The kernel called as the library calls it: results in the inputs' dtype, ``delta`` computed before."""
    backend, settings = load("cpu"), AttnSettings(softmax_scale=x.q.shape[2] ** -0.5)
    kernel_mask = KernelMask(mask.bands, mask.num_q, mask.num_k)
    dtype = x.q.dtype
    result = backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=dtype)
    delta = row_dots(result.out, x.dout)
    return {
        "forward": lambda: backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=dtype),
        "backward": lambda: backend.backward(
            x.dout, x.q, x.k, x.v, result.lse, delta, kernel_mask, settings, grad_dtype=dtype
        ),
    }


def sdpa(mask: BenchmarkMask, x: Inputs) -> dict[str, Call]:
    """torch's fused attention, with ``is_causal`` or a dense additive mask.

    Keys and values are repeated to the query heads before the clock starts: on CPUs that is faster than ``enable_gqa``, and it spares the
    backward the sum over the heads of a group.
    """
    q, k, v, dout = x.by_heads()
    k, v = (t.repeat_interleave(NUM_HEADS_Q // NUM_HEADS_KV, dim=1) for t in (k, v))
    options: dict[str, Any] = {"is_causal": bool(mask.is_causal)}
    if mask.is_causal is None:
        dense = torch.from_numpy(mask.mask.to_dense())
        options["attn_mask"] = torch.zeros(dense.shape, dtype=q.dtype).masked_fill_(~dense, float("-inf"))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    out = attend(*leaves)
    return {
        "forward": lambda: attend(q, k, v),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }


def flex(mask: BenchmarkMask, x: Inputs) -> dict[str, Call]:
    """Compiled FlexAttention with its block mask, grouped heads as they are; it has no backward on CPUs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # compiled for each mask: kept code would, after a few masks, give way to the uncompiled one
    total = mask.mask.num_q
    block_mask = create_block_mask(mask.flex_rule, None, None, total, total, device="cpu")
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    q, k, v, _ = x.by_heads()

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

    expected, actual = ours(mask.mask, x)["forward"](), forward()
    difference = (expected.out.transpose(0, 1).float() - actual[0].float()).abs().max().item()  # type: ignore[attr-defined]
    if not difference < 0.1:  # bf16 probabilities err by a hundredth
        raise RuntimeError(f"FlexAttention's mask has other cells than ours: outputs differ by {difference:.2g}")
    return {"forward": forward}


def fastest(call: Call, enough_s: float) -> float:
    """Seconds of the fastest of as many calls as begin within ``enough_s``, at least one."""
    begun, best = time.perf_counter(), float("inf")
    while True:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begun >= enough_s:
            return best
