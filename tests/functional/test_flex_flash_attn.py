"""flex_flash_attn_func against the float64 oracle: outputs, statistics and every gradient, through autograd.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims; num_sink sinks.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.functional import flex_flash_attn_func
from magi_attention.functional.sink import apply_sink, sink_gradient
from magi_attention.testing.kernel_check import KernelCase, KernelInputs, Truth, make_inputs
from magi_attention.testing.mask_families import MASK_FAMILIES, Slices
from magi_attention.testing.oracle import AttnResult, attention_oracle, plain_result
from magi_attention.testing.poison import poisoned_memory

NUM_TOKENS = 131
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def differentiate(
    inputs: KernelInputs, slices: Slices, sink: Tensor | None = None, **options: Any
) -> tuple[AttnResult, AttnForwardMeta]:
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if sink is not None:
        leaves.append(sink.clone().requires_grad_())
        options["sink"] = leaves[-1]
    with poisoned_memory():
        out, meta = flex_flash_attn_func(*leaves[:3], *slices.tables(), **options)
        out.backward(inputs.dout)
    assert out.dtype == inputs.q.dtype
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None and grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))
    assert meta.lse is not None
    return AttnResult(out.detach(), meta.lse.detach(), meta.max_logits, *grads), meta


def find_truth(inputs: KernelInputs, slices: Slices, **options: Any) -> Truth:
    tensors = (inputs.q, inputs.k, inputs.v, slices.dense())
    options["dout"] = inputs.dout
    return Truth(attention_oracle(*tensors, **options), plain_result(*tensors, **options))


def make_sink(layout: str, num_q: int, num_sink: int, num_heads_q: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (num_sink, num_heads_q) if layout == "sh" else (num_q, num_sink, num_heads_q)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_results_and_gradients(family: str, dtype: torch.dtype) -> None:
    case = KernelCase(family, dtype, NUM_TOKENS, head_dim=32, head_dim_v=24)
    inputs = make_inputs(case)
    actual, meta = differentiate(inputs, case.slices, return_max_logits=True)
    find_truth(inputs, case.slices).check(actual)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert meta.lse is not None and meta.max_logits is not None and meta.lse.dtype == meta.max_logits.dtype == wide
    assert meta.lse.requires_grad and not meta.max_logits.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("family", ["causal", "empty_rows", "cross_documents", "nothing"])
def test_sink(family: str, layout: str, dtype: torch.dtype) -> None:
    case = KernelCase(family, dtype, NUM_TOKENS, head_dim=32, head_dim_v=24)
    inputs, slices = make_inputs(case), case.slices
    for num_sink, softcap in ((1, 0.0), (3, 8.0)):
        sink = make_sink(layout, slices.num_q, num_sink, case.num_heads_q)
        actual, meta = differentiate(inputs, slices, sink, sink_layout=layout, softcap=softcap, return_max_logits=True)
        find_truth(inputs, slices, sink=sink, sink_layout=layout, softcap=softcap).check(actual)
        empty = ~slices.dense().any(dim=1)
        expected = torch.logsumexp(sink.double(), dim=0 if layout == "sh" else 1).expand(slices.num_q, -1)
        assert meta.lse is not None and actual.out is not None
        torch.testing.assert_close(meta.lse[empty].double(), expected[empty], rtol=0, atol=1e-6)
        assert (actual.out[empty] == 0).all()


@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_sink_of_another_dtype(layout: str) -> None:
    case = KernelCase("window", torch.bfloat16, NUM_TOKENS, head_dim=32)
    inputs, slices = make_inputs(case), case.slices
    sink = make_sink(layout, slices.num_q, 2, case.num_heads_q, torch.bfloat16)
    actual, _ = differentiate(inputs, slices, sink, sink_layout=layout)
    find_truth(inputs, slices, sink=sink, sink_layout=layout).check(actual)


@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_sinks_at_the_ends(layout: str) -> None:
    """No sinks and sinks of -inf change nothing; a sink far above every logit takes all; one far below takes nothing."""
    case = KernelCase("empty_rows", torch.float64, NUM_TOKENS, head_dim=16)
    inputs, slices = make_inputs(case), case.slices
    without, _ = differentiate(inputs, slices)
    assert without.out is not None and without.lse is not None and without.dq is not None
    for num_sink, value in ((0, 0.0), (2, -math.inf), (1, -1e30)):
        sink = torch.full_like(make_sink(layout, slices.num_q, num_sink, case.num_heads_q), value)
        given, _ = differentiate(inputs, slices, sink, sink_layout=layout)
        assert given.out is not None and given.dq is not None and given.dsink is not None
        torch.testing.assert_close(given.out, without.out)
        torch.testing.assert_close(given.dq, without.dq)
        assert (given.dsink == 0).all()
    sink = torch.full_like(make_sink(layout, slices.num_q, 1, case.num_heads_q), 1e30)
    given, _ = differentiate(inputs, slices, sink, sink_layout=layout)
    assert all(x is not None and (x == 0).all() for x in (given.out, given.dq, given.dk, given.dv, given.dsink))


@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_sink_functions_without_autograd(layout: str) -> None:
    """What a runtime does that calls kernels itself: the same numbers as autograd through the formula."""
    num_q, hq, dv, num_sink = 17, 4, 8, 3
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(num_q, hq, dv, generator=generator, dtype=torch.float64)
    lse = torch.randn(num_q, hq, generator=generator, dtype=torch.float64)
    dout = torch.randn(num_q, hq, dv, generator=generator, dtype=torch.float64)
    sink = make_sink(layout, num_q, num_sink, hq, torch.float64).requires_grad_()
    in_rows = sink.expand(num_q, num_sink, hq) if layout == "ssh" else sink.unsqueeze(0).expand(num_q, num_sink, hq)
    total = lse.exp() + in_rows.exp().sum(dim=1)
    expected = out * (lse.exp() / total).unsqueeze(-1)
    (expected_grad,) = torch.autograd.grad(expected, sink, dout)
    with torch.no_grad():
        new_out, new_lse = apply_sink(out, lse, sink, layout)
        grad = sink_gradient(new_lse, sink, (new_out * dout).sum(dim=-1), layout)
    torch.testing.assert_close(new_out, expected.detach())
    torch.testing.assert_close(new_lse, total.log().detach())
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_scale_and_softcap(softcap: float) -> None:
    case = KernelCase("bi_causal", torch.float32, NUM_TOKENS, head_dim=32)
    inputs = make_inputs(case)
    actual, _ = differentiate(inputs, case.slices, softmax_scale=0.4, softcap=softcap, return_max_logits=True)
    find_truth(inputs, case.slices, softmax_scale=0.4, softcap=softcap).check(actual)


def test_no_type_map_is_full() -> None:
    case = KernelCase("varlen_full", torch.float32, NUM_TOKENS, head_dim=32)
    inputs = make_inputs(case)
    q_ranges, k_ranges, types = case.slices.tables()
    tensors = (inputs.q, inputs.k, inputs.v, q_ranges, k_ranges)
    assert torch.equal(flex_flash_attn_func(*tensors)[0], flex_flash_attn_func(*tensors, types)[0])
    find_truth(inputs, case.slices).check(AttnResult(out=flex_flash_attn_func(*tensors)[0]))


TUNING = {
    "deterministic": True,
    "sm_margin": 8,
    "disable_fwd_atomic_reduction": True,
    "disable_bwd_dkv_atomic_reduction": True,
    "ref_block_size": (64, 128),
    "max_seqlen_q": 7,
    "auto_range_merge": True,
    "swap_ab": True,
    "pack_gqa": True,
    "cat_gqa": True,
    "sparse_load": True,
    "swap_bwd_qk_loop": True,
}


@pytest.mark.parametrize("name", TUNING)
def test_tuning_changes_nothing_and_says_so(name: str) -> None:
    case = KernelCase("random_b", torch.float32, NUM_TOKENS, head_dim=32)
    inputs = make_inputs(case)
    plain, _ = differentiate(inputs, case.slices)
    tuned, _ = differentiate(inputs, case.slices, **{name: TUNING[name]})
    for field, value in vars(plain).items():
        assert value is None or torch.equal(value, getattr(tuned, field)), field
    entry = (inspect.getdoc(flex_flash_attn_func) or "").partition(f"\n    {name}: ")[2].partition("\n    ")[0]
    assert "not used" in entry.lower() or "passed on" in entry.lower(), "its documentation must say whether it is used"


def test_signature() -> None:
    parameters = inspect.signature(flex_flash_attn_func).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v", "q_ranges", "k_ranges", "attn_type_map"]
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "sink": None,
        "sink_layout": "sh",
        "softmax_scale": None,
        "softcap": 0.0,
        "deterministic": False,
        "sm_margin": 0,
        "disable_fwd_atomic_reduction": False,
        "disable_bwd_dkv_atomic_reduction": False,
        "ref_block_size": None,
        "max_seqlen_q": None,
        "auto_range_merge": False,
        "swap_ab": False,
        "pack_gqa": False,
        "cat_gqa": False,
        "sparse_load": False,
        "swap_bwd_qk_loop": False,
        "return_max_logits": False,
        "index_attn": False,
        "index_attn_indices": None,
        "q_block_size": 1,
        "k_block_size": 1,
        "mask": None,
    }
    assert list(parameters)[6:] == list(keywords)


def test_strided_inputs_and_gradients() -> None:
    """Views of one projection, a last axis that is not contiguous, and the expanded gradient of a sum."""
    slices = MASK_FAMILIES["varlen_causal"](NUM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(NUM_TOKENS, 2 * 3 * 16, generator=generator, requires_grad=True)
    q, k, v = (x.unflatten(1, (2, 16)) for x in projected.split(32, dim=1))
    turned = torch.randn(2, 16, NUM_TOKENS, generator=generator, requires_grad=True)
    for keys in (k, turned.permute(2, 0, 1)):
        out, _ = flex_flash_attn_func(q, keys, v, *slices.tables())
        dout = torch.ones(()).expand_as(out)
        actual = torch.autograd.grad(out.sum(), (q, keys, v))
        truth = find_truth(KernelInputs(q, keys, v, dout), slices)
        truth.check(AttnResult(out.detach(), None, None, *actual))


def test_max_logits_only_when_asked() -> None:
    case = KernelCase("causal", torch.float32, NUM_TOKENS, head_dim=16)
    inputs = make_inputs(case)
    assert differentiate(inputs, case.slices)[1].max_logits is None


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 0), (0, 9), (9, 0), (9, 9)])
def test_no_tokens_or_no_slices(num_q: int, num_k: int) -> None:
    q, dout = torch.randn(num_q, 4, 16), torch.randn(num_q, 4, 8)
    k, v = torch.randn(num_k, 2, 16), torch.randn(num_k, 2, 8)
    no_slices = Slices((), num_q, num_k)
    actual, meta = differentiate(KernelInputs(q, k, v, dout), no_slices, return_max_logits=True)
    assert all(x is not None and (x == 0).all() for x in (actual.out, actual.dq, actual.dk, actual.dv))
    assert meta.lse is not None and meta.lse.shape == (num_q, 4) and (meta.lse == -math.inf).all()
    assert meta.max_logits is not None and (meta.max_logits == -math.inf).all()
    sink = torch.randn(2, 4)
    actual, meta = differentiate(KernelInputs(q, k, v, dout), no_slices, sink)
    assert actual.dsink is not None and (actual.dsink == 0).all()


def test_empty_ranges_are_slices_without_cells() -> None:
    case = KernelCase("causal", torch.float32, NUM_TOKENS, head_dim=16)
    inputs, slices = make_inputs(case), case.slices
    with_empty = Slices((*slices.rows, (5, 5, 0, 100, 0), (0, 100, 7, 7, 3)), slices.num_q, slices.num_k)
    first, second = differentiate(inputs, slices)[0], differentiate(inputs, with_empty)[0]
    assert first.out is not None and second.out is not None and torch.equal(first.out, second.out)


def test_only_what_requires_grad_gets_one() -> None:
    case = KernelCase("causal", torch.float32, NUM_TOKENS, head_dim=16)
    inputs, tables = make_inputs(case), case.slices.tables()
    assert not flex_flash_attn_func(inputs.q, inputs.k, inputs.v, *tables)[0].requires_grad
    v = inputs.v.clone().requires_grad_()
    out, meta = flex_flash_attn_func(inputs.q, inputs.k, v, *tables)
    out.backward(inputs.dout)
    assert meta.lse is not None
    find_truth(inputs, case.slices).check(AttnResult(lse=meta.lse.detach(), dv=v.grad))
    assert inputs.q.grad is None and inputs.k.grad is None


def test_a_second_derivative_is_refused() -> None:
    case = KernelCase("causal", torch.float64, 16, head_dim=8)
    inputs = make_inputs(case)
    q = inputs.q.requires_grad_()
    out, _ = flex_flash_attn_func(q, inputs.k, inputs.v, *case.slices.tables())
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_the_mask_of_a_call_is_its_own() -> None:
    """Masks are kept between calls: other ranges, types and lengths must not find each other's."""
    inputs = make_inputs(KernelCase("causal", torch.float32, NUM_TOKENS, head_dim=16))
    families = [
        MASK_FAMILIES[name](NUM_TOKENS) for name in ("full", "causal", "inv_causal", "varlen_full", "varlen_causal")
    ]
    for slices in families + families[::-1]:
        out, _ = flex_flash_attn_func(inputs.q, inputs.k, inputs.v, *slices.tables())
        find_truth(inputs, slices).check(AttnResult(out=out))
    short = torch.tensor([[0, 7]], dtype=torch.int32)
    for num_tokens in (7, 9, 30):
        out, _ = flex_flash_attn_func(*(x[:num_tokens] for x in (inputs.q, inputs.k, inputs.v)), short, short)
        assert out.shape[0] == num_tokens and (out[7:] == 0).all()
