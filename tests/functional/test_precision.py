"""MAGI_ATTENTION_PRECISION: attention computes in the dtype that it names; results and gradients keep the inputs' dtypes.

And MAGI_ATTENTION_KERNEL_BACKEND: which kernel computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from magi_attention.api import calc_attn, dispatch, magi_attn_key
from magi_attention.common import AttnForwardMeta
from magi_attention.functional import flex_flash_attn_func
from magi_attention.mask import causal
from magi_attention.testing.dist import shared_pool

TOTAL, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

Attend = Callable[..., tuple[Tensor, AttnForwardMeta]]


def flex(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, AttnForwardMeta]:
    ranges, types = torch.tensor([[0, TOTAL]], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return flex_flash_attn_func(q, k, v, ranges, ranges, types, sink=sink, return_max_logits=True)


def spread(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, AttnForwardMeta]:
    key = magi_attn_key(causal(TOTAL), HEADS, KV_HEADS, HEAD_DIM, chunk_size=TOTAL)
    return calc_attn(q, k, v, key, sink=sink, return_max_logits=True)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    tensors = [torch.randn(TOTAL, one, HEAD_DIM, generator=generator) for one in heads]
    return [x.to(dtype).requires_grad_() for x in tensors] + [torch.zeros(1, HEADS, requires_grad=True)]


def run(attend: Attend, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``(out, lse, max_logits)`` and the gradients."""
    out, meta = attend(*tensors)
    assert meta.lse is not None and meta.max_logits is not None
    return [out, meta.lse, meta.max_logits], list(torch.autograd.grad(out.float().square().sum(), tensors))


@pytest.mark.parametrize("attend", [flex, spread])
@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_computed_in_one_dtype_and_returned_in_another(
    attend: Attend, asked: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAGI_ATTENTION_PRECISION", raising=False)
    tensors = inputs(DTYPES[given])
    cast = [x.detach().to(DTYPES[asked]).requires_grad_() for x in tensors[:3]]
    expected, expected_grads = run(attend, [*cast, tensors[3]])
    kept, _ = run(attend, tensors)
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", asked)
    results, grads = run(attend, tensors)
    for result, computed, plain in zip(results, expected, kept, strict=True):
        assert result.dtype == plain.dtype
        assert torch.equal(result, computed.to(plain.dtype))
    for grad, tensor, computed in zip(grads, tensors, expected_grads, strict=True):
        assert grad.dtype == tensor.dtype
        # The gradient of the output reaches the cast rounded to the inputs' dtype, and so differently from a loss of the wide output.
        torch.testing.assert_close(grad.double(), computed.double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("attend", [flex, spread])
def test_float64_inside_is_float64(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGI_ATTENTION_PRECISION", raising=False)
    tensors = inputs(torch.float32)
    exact = attend(*(x.double() for x in tensors[:3]), tensors[3])[0]
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp64")
    assert torch.equal(attend(*tensors)[0], exact.float())


def check_on_ranks() -> None:
    key = magi_attn_key(causal(TOTAL), HEADS, KV_HEADS, HEAD_DIM, chunk_size=3)
    q, k, v, sink = inputs(torch.float32)
    out, meta = calc_attn(*(dispatch(x, key) for x in (q, k, v)), key, sink=sink)
    os.environ["MAGI_ATTENTION_PRECISION"] = ""
    exact, exact_meta = calc_attn(*(dispatch(x.double(), key) for x in (q, k, v)), key, sink=sink)
    assert torch.equal(out, exact.float())
    assert meta.lse is not None and exact_meta.lse is not None
    assert torch.equal(meta.lse, exact_meta.lse.float())


def test_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp64")
    shared_pool().run(check_on_ranks, num_ranks=3)


@pytest.mark.parametrize("attend", [flex, spread])
@pytest.mark.parametrize(("name", "backend"), [("sdpa", "reference"), ("sdpa_ol", "tiled"), ("ffa", "auto")])
def test_kernels_by_their_other_names(attend: Attend, name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(torch.bfloat16)
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", backend)
    expected, expected_grads = run(attend, tensors)
    monkeypatch.delenv("MAGI_ATTENTION_BACKEND")
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", name)
    results, grads = run(attend, tensors)
    for actual, wanted in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        assert torch.equal(actual, wanted)
    monkeypatch.setenv("MAGI_ATTENTION_KERNEL_BACKEND", "fa4")
    with pytest.raises(ValueError, match="KERNEL_BACKEND is fa4"):
        attend(*tensors)


@pytest.mark.parametrize("attend", [flex, spread])
def test_autocast_does_not_undo_it(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(torch.float32)
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp32")
    alone = attend(*tensors)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(*tensors)[0], alone)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
@pytest.mark.parametrize("attend", [flex, spread])
def test_compiled(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    tensors = inputs(torch.float32)
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "bf16")
    expected, expected_grads = run(attend, tensors)
    key = magi_attn_key(causal(TOTAL), HEADS, KV_HEADS, HEAD_DIM, chunk_size=TOTAL)
    if attend is spread:
        compiled = torch.compile(
            lambda *x: calc_attn(*x[:3], key, sink=x[3], return_max_logits=True), fullgraph=True, backend="aot_eager"
        )
    else:
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results, grads = run(compiled, tensors)
    for actual, wanted in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("attend", [flex, spread])
def test_what_is_not_floating_is_refused(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", "fp32")
    tensors = [x.detach().long() for x in inputs(torch.float32)[:3]]
    with pytest.raises(ValueError, match="q, k and v must have one"):
        attend(*tensors, torch.zeros(1, HEADS))
