"""calc_attn under torch.compile: one graph, on one rank and on several, for one key and for the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from magi_attention.api import DistAttnRuntimeKey, calc_attn, clear_cache, dispatch, magi_attn_varlen_key, undispatch
from magi_attention.testing.dist import shared_pool

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.sink = nn.Parameter(torch.randn(2, HEADS))
        self.options = options

    def forward(self, x: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out, meta = calc_attn(q, k, v, key, sink=self.sink, **self.options)
        return out.flatten(1), meta.max_logits


def make(num_tokens: int, cut: int) -> DistAttnRuntimeKey:
    edges = [0, cut, num_tokens]
    return magi_attn_varlen_key(edges, edges, HEADS, KV_HEADS, HEAD_DIM, causal=True, chunk_size=4)


def differentiate(run: Any, layer: Layer, key: DistAttnRuntimeKey) -> list[Tensor]:
    x = torch.randn(key.total_seqlen_q, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, max_logits = run(dispatch(x, key), key)
    loss = undispatch(out, key).square().mean()
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [x, *layer.parameters()]),
        *([] if max_logits is None else [max_logits]),
    ]


def check_compiled() -> None:
    torch._dynamo.reset()
    for options in ({}, {"softcap": 4.0, "softmax_scale": 0.5, "return_max_logits": True}):
        layer, counter = Layer(**options), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        counts = []
        for num_tokens, cut in ((32, 10), (32, 10), (48, 7), (64, 30), (64, 11)):
            key = make(num_tokens, cut)
            for expected, actual in zip(
                differentiate(layer, layer, key), differentiate(compiled, layer, key), strict=True
            ):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
            counts.append(counter.frame_count)
        assert counts[0] == counts[1] and counts[2] == counts[-1], f"compiled anew for another key: {counts}"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
def test_on_one_rank() -> None:
    check_compiled()


@pytest.mark.long
def test_on_several_ranks() -> None:
    shared_pool().run(check_compiled, num_ranks=2)


def test_errors_under_compile() -> None:
    layer, key = Layer(), make(32, 10)
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(ValueError, match="32"):
        compiled(torch.randn(31, 16), key)
    x = torch.randn(32, 16)
    compiled(x, key)
    clear_cache()
    with pytest.raises(ValueError, match="no plan stands behind this key"):
        compiled(x, key)


def test_equal_arguments_find_the_same_handle() -> None:
    assert make(32, 10).handle == make(32, 10).handle != make(32, 11).handle
