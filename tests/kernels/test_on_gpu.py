"""What only a GPU can show: no waiting for it, graphs of it, kernels that `torch.compile` calls, sizes beyond 16 and 31 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.interface import AttnSettings
from magi_attention.kernels.registry import load
from magi_attention.testing.mask_families import MASK_FAMILIES, Slices

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of what inductor imports
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
FAMILIES = ["varlen_causal", "shared_prefix", "random_b", "window", "empty_rows"]


@pytest.fixture(autouse=True, params=["triton", "hopper"])
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that reads masks on the device."""
    name = str(request.param)
    if name == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", name)
    return name


def only_triton(name: str) -> None:
    if name != "triton":
        pytest.skip("of heads, dtypes or options that the other does not take")


def make(slices: Slices, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((slices.num_q, HEADS), (slices.num_k, KV_HEADS), (slices.num_k, KV_HEADS))
    return [
        torch.randn(*size, HEAD_DIM, generator=generator, device="cuda").to(dtype).requires_grad_() for size in sizes
    ]


def differentiate(inputs: list[Tensor], tables: tuple[Tensor, ...], run: Any = flex_flash_attn_func) -> list[Tensor]:
    out, meta = run(*inputs, *tables)
    return [out.detach(), meta.lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_on_the_device_give_the_bits_of_tables_on_the_host(
    family: str, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = MASK_FAMILIES[family](1009)
    inputs = make(slices)
    actual = differentiate(inputs, slices.tables("cuda"))
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", "1")  # reads them
    expected = differentiate(inputs, slices.tables("cuda"))
    repeatable = len(actual) if backend_name == "triton" else 2  # hopper's dq is summed in any order
    assert all(torch.equal(x, y) for x, y in zip(actual[:repeatable], expected[:repeatable], strict=True))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_the_host_does_not_wait() -> None:
    slices = MASK_FAMILIES["varlen_causal"](1009)
    inputs = make(slices)
    differentiate(inputs, slices.tables("cuda"))  # compiles the kernels
    others = [MASK_FAMILIES[family](1009).tables("cuda") for family in ("varlen_causal", "varlen_full", "causal")]
    with no_waiting():
        for tables in others:
            differentiate(inputs, tables)


def test_ranges_beyond_the_tensors_touch_nothing_outside() -> None:
    slices = MASK_FAMILIES["varlen_causal"](300)
    inputs = make(slices)
    q_ranges, k_ranges, types = slices.tables("cuda")
    wild = torch.tensor([[-7, 1 << 30]], dtype=torch.int32, device="cuda")
    tables = torch.cat([q_ranges, wild]), torch.cat([k_ranges, wild]), torch.cat([types, types[:1]])
    results = differentiate(inputs, tables)
    torch.cuda.synchronize()  # an access outside would be reported here
    assert [x.shape for x in results[2:]] == [x.shape for x in inputs]


def test_a_graph_makes_its_lists_anew() -> None:
    first, second = (MASK_FAMILIES[family](512) for family in ("varlen_causal", "varlen_full"))
    inputs = make(first)
    num_slices = max(len(first.rows), len(second.rows))

    def padded(slices: Slices) -> list[Tensor]:
        return [
            torch.cat([x, x.new_zeros(num_slices - len(x), *x.shape[1:])]) for x in slices.tables("cuda")
        ]  # slices of nothing

    static = padded(first)
    with torch.no_grad():
        for _ in range(2):
            flex_flash_attn_func(*inputs, *static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = flex_flash_attn_func(*inputs, *static)
        for slices in (first, second, first):
            for place, x in zip(static, padded(slices), strict=True):
                place.copy_(x)
            graph.replay()
            expected, _ = flex_flash_attn_func(*inputs, *slices.tables("cuda"))
            assert torch.equal(out, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic: bool, backend_name: str) -> None:
    only_triton(backend_name)
    torch._dynamo.reset()

    def layer(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Any:
        out, meta = flex_flash_attn_func(q * 2, k, v.sin(), *tables, softcap=20.0, return_max_logits=True)
        return out.cos(), meta

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for num_tokens in (1009, 640):
        slices = MASK_FAMILIES["varlen_causal"](num_tokens)
        inputs, tables = make(slices, torch.float32), slices.tables("cuda")
        expected, actual = (differentiate(inputs, tables, run) for run in (layer, compiled))
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_more_programs_than_16_bits_count(backend_name: str) -> None:
    """Of one-token documents, each of which attends itself: the output is v, the lse the one logit."""
    only_triton(backend_name)
    num_tokens, num_heads = 1 << 17, 80  # 1,024 tiles of 128 queries and 80 heads, and more of smaller tiles
    q, k, v = (
        torch.randn(num_tokens, num_heads, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    edges = torch.arange(num_tokens + 1, device="cuda", dtype=torch.int32)
    ranges = torch.stack([edges[:-1], edges[1:]], dim=1)
    out, meta = flex_flash_attn_func(q, k, v, ranges, ranges)
    assert torch.equal(out, v)
    assert meta.lse is not None
    torch.testing.assert_close(meta.lse, (q.float() * k.float()).sum(-1) / 4, rtol=1e-4, atol=1e-4)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    # Probabilities are 1, so that only v has a gradient; those of q and k are what rounding leaves.
    assert torch.equal(dv, torch.ones_like(v)) and dq.abs().max() < 0.1 and dk.abs().max() < 0.1


@pytest.mark.long
def test_more_elements_than_31_bits_count(backend_name: str) -> None:
    """Rows that lie beyond 2^31 elements: the last document of a long sequence, whose tiles begin where it does, is as it is alone."""
    only_triton(backend_name)
    num_tokens, tail, num_heads = (1 << 31) // (64 * 128) + 4096, 1024, 64
    q = torch.randn(num_tokens, num_heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(num_tokens, num_heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    backend, settings = load("triton"), AttnSettings(softmax_scale=0.1)
    start = num_tokens - tail
    assert start * num_heads * 128 > 1 << 31
    whole = Slices(((0, 7, 0, 7, 1), (start, num_tokens, start, num_tokens, 1)), num_tokens, num_tokens)
    alone = Slices(((0, tail, 0, tail, 1),), tail, tail)
    out, lse, _ = backend.forward(q, k, v, whole.kernel_mask(), settings, out_dtype=q.dtype)
    rest = [x[start:].contiguous() for x in (q, k, v)]
    expected, expected_lse, _ = backend.forward(*rest, alone.kernel_mask(), settings, out_dtype=q.dtype)
    assert torch.equal(out[start:], expected) and torch.equal(lse[start:], expected_lse)
    dout, delta = q, torch.zeros_like(lse)
    grads = backend.backward(dout, q, k, v, lse, delta, whole.kernel_mask(), settings, grad_dtype=q.dtype)
    wanted = backend.backward(
        rest[0], *rest, expected_lse, delta[start:], alone.kernel_mask(), settings, grad_dtype=q.dtype
    )
    assert all(torch.equal(grad[start:], other) for grad, other in zip(grads, wanted, strict=True))
