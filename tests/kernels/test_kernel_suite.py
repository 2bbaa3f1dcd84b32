"""One suite for all kernels: every result and gradient against the float64 oracle, on awkward masks and shapes.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.kernels.interface import AttnSettings, Backend, DeviceMask, KernelMask, Partial
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.kernels.registry import BACKENDS
from magi_attention.testing.kernel_check import (
    KernelCase,
    KernelInputs,
    check_kernel,
    find_truth,
    key_parts,
    make_inputs,
    row_statistics,
    run_kernel,
    solve,
)
from magi_attention.testing.mask_families import MASK_FAMILIES
from magi_attention.testing.oracle import AttnResult

HEAD_DIMS = [(16, 16), (40, 40), (64, 64), (80, 80), (128, 128), (192, 128), (33, 65), (256, 256), (1, 1)]
HEADS = [(1, 1), (3, 3), (6, 2), (8, 1), (20, 5)]


def test_every_backend_is_tested(tested_names: set[str]) -> None:
    assert tested_names == set(BACKENDS)


@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_mask(backend: Backend, dtype: torch.dtype, device: str, family: str) -> None:
    check_kernel(backend, KernelCase(family, dtype), device)


@pytest.mark.parametrize("family", ["varlen_causal", "window", "split_by_diagonal", "random_b"])
def test_many_tiles(backend: Backend, device: str, num_tokens_many_tiles: int, family: str) -> None:
    for dtype, heads in ((torch.float32, (4, 2)), (torch.bfloat16, (2, 2))):
        case = KernelCase(family, dtype, num_tokens_many_tiles, *heads, head_dim=32)
        check_kernel(backend, case, device)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_head_dims(backend: Backend, dtype: torch.dtype, device: str, head_dims: tuple[int, int]) -> None:
    check_kernel(backend, KernelCase(dtype=dtype, head_dim=head_dims[0], head_dim_v=head_dims[1]), device)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
def test_heads(backend: Backend, dtype: torch.dtype, device: str, heads: tuple[int, int]) -> None:
    check_kernel(backend, KernelCase("shared_prefix", dtype, 97, *heads, head_dim=24), device)


@pytest.mark.parametrize("num_tokens", [16, 17, 31, 64, 127, 128, 129, 257])
def test_lengths(backend: Backend, device: str, num_tokens: int) -> None:
    for family in ("causal", "more_keys", "more_queries", "random_cross"):
        check_kernel(backend, KernelCase(family, num_tokens=num_tokens, head_dim=16), device)


@pytest.mark.parametrize("family", ["causal", "empty_rows", "cross_documents"])
@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_softcap(backend: Backend, dtype: torch.dtype, device: str, family: str, softcap: float) -> None:
    check_kernel(backend, KernelCase(family, dtype, head_dim=40, softcap=softcap), device)


@pytest.mark.parametrize("family", ["shared_prefix", "random_b", "empty_rows"])
def test_slices_that_lie_on_the_device(backend: Backend, device: str, family: str) -> None:
    """The same bits as of a mask that is known to the host."""
    case = KernelCase(family, head_dim=16)
    inputs, slices = make_inputs(case, device), case.slices
    mask = DeviceMask(*slices.tables(device), slices.num_q, slices.num_k)
    actual, expected = (run_kernel(backend, inputs, one, case.settings) for one in (mask, slices.kernel_mask()))
    for name, x in vars(expected).items():
        assert x is None or torch.equal(x, getattr(actual, name)), f"{name} differs"


def test_softmax_scale(backend: Backend, device: str) -> None:
    for scale in (0.03, 1.0, -0.2):
        check_kernel(backend, KernelCase("bi_causal", head_dim=32, softmax_scale=scale), device)


def test_large_logits(backend: Backend, dtype: torch.dtype, device: str) -> None:
    """Logits of a few hundred, where exp overflows unless the largest is taken out."""
    check_kernel(backend, KernelCase("varlen_block_causal", dtype, magnitude=100.0), device)


def test_results_have_the_asked_dtype(backend: Backend, dtype: torch.dtype, device: str) -> None:
    case = KernelCase("random_b", dtype, head_dim=40, head_dim_v=24)
    (inputs, truth), mask, wide = solve(case, device), case.slices.kernel_mask(), accumulation_dtype(dtype)
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    for asked in (None, dtype):
        out, lse, max_logits = backend.forward(q, k, v, mask, case.settings, out_dtype=asked)
        grads = backend.backward(
            dout, q, k, v, *row_statistics(out, lse, inputs), mask, case.settings, grad_dtype=asked
        )
        assert out.dtype == (asked or wide) and [grad.dtype for grad in grads] == [asked or wide] * 3
        assert out.shape == dout.shape and [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
        assert max_logits is not None and lse.dtype == max_logits.dtype == wide
        truth.check(AttnResult(out, lse, max_logits, *grads))
    without = backend.forward(q, k, v, mask, replace(case.settings, return_max_logits=False))
    assert without.max_logits is None and torch.equal(without.lse, lse)


def test_a_wide_dout_is_taken(backend: Backend, device: str) -> None:
    case = KernelCase("causal", torch.bfloat16, head_dim=32)
    inputs, truth = solve(case, device)
    q, k, v, mask = inputs.q, inputs.k, inputs.v, case.slices.kernel_mask()
    out, lse, _ = backend.forward(q, k, v, mask, case.settings)
    statistics = row_statistics(out, lse, inputs)
    grads = backend.backward(inputs.dout.float(), q, k, v, *statistics, mask, case.settings)
    truth.check(AttnResult(out, lse, None, *grads))


def _packed(x: Tensor, left: int, right: int) -> Tensor:
    """The same numbers as the middle columns of a wider buffer of NaN: ``[n, h, d]`` strided, last axis contiguous."""
    buffer = torch.full((x.shape[0], left + x[0].numel() + right), math.nan, dtype=x.dtype, device=x.device)
    view = buffer[:, left : left + x[0].numel()].unflatten(1, x.shape[1:])
    return view.copy_(x)


def _heads_first(x: Tensor) -> Tensor:
    """The same numbers laid out as ``[h, n, d]``."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_strided_inputs(backend: Backend, dtype: torch.dtype, device: str) -> None:
    case = KernelCase("prefix_lm", dtype, head_dim=40, head_dim_v=24)
    (inputs, truth), mask, num_heads = solve(case, device), case.slices.kernel_mask(), case.num_heads_kv
    k_and_v = torch.cat([inputs.k.flatten(1), inputs.v.flatten(1)], dim=1)  # [num_k, hk * (d + dv)]
    k, v = (x.unflatten(1, (num_heads, -1)) for x in k_and_v.split([num_heads * 40, num_heads * 24], dim=1))
    variants = [
        KernelInputs(_heads_first(inputs.q), k, v, _heads_first(inputs.dout)),
        KernelInputs(
            _packed(inputs.q, 3, 5), _packed(inputs.k, 1, 0), _packed(inputs.v, 0, 7), _packed(inputs.dout, 5, 2)
        ),
        KernelInputs(inputs.q, inputs.k, inputs.v, inputs.dout[:1, :1].expand_as(inputs.dout)),
    ]
    for strided in variants[:2]:
        truth.check(run_kernel(backend, strided, mask, case.settings))
    # dout as autograd makes it from a sum: strides of 0.
    truth = find_truth(case, variants[2])
    truth.check(run_kernel(backend, variants[2], mask, case.settings))


def test_inputs_are_not_modified(backend: Backend, dtype: torch.dtype, device: str) -> None:
    case = KernelCase("window", dtype, softcap=5.0)
    inputs, mask = make_inputs(case, device), case.slices.kernel_mask()
    before, bands = inputs.clone(), mask.bands.copy()
    out, lse, _ = backend.forward(inputs.q, inputs.k, inputs.v, mask, case.settings)
    statistics = row_statistics(out, lse, inputs)
    statistics_before = [x.clone() for x in statistics]
    backend.backward(inputs.dout, inputs.q, inputs.k, inputs.v, *statistics, mask, case.settings)
    assert all(torch.equal(x, getattr(before, name)) for name, x in vars(inputs).items())
    assert np.array_equal(mask.bands, bands)
    assert all(torch.equal(x, y) for x, y in zip(statistics, statistics_before, strict=True))


def test_autocast_changes_nothing(backend: Backend, dtype: torch.dtype, device: str) -> None:
    case = KernelCase("window", dtype, 97, head_dim=40)
    inputs = make_inputs(case, device)
    expected = run_kernel(backend, inputs, case.slices.kernel_mask(), case.settings)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        actual = run_kernel(backend, inputs, case.slices.kernel_mask(), case.settings)
    for name, x in vars(expected).items():
        assert x is None or torch.equal(x, getattr(actual, name)), f"{name} differs under autocast"


@pytest.mark.parametrize("family", ["causal", "empty_rows", "shared_prefix", "random_cross", "nothing"])
def test_merging_parts_into_a_partial(backend: Backend, dtype: torch.dtype, device: str, family: str) -> None:
    case = KernelCase(family, dtype, head_dim=40, head_dim_v=24, softcap=20.0)
    (inputs, truth), whole = solve(case, device), case.slices.kernel_mask()
    partial: Partial | None = None
    for keys, mask in key_parts(whole, [50, 51, 51, 140]):
        merged = backend.forward(inputs.q, inputs.k[keys], inputs.v[keys], mask, case.settings, into=partial)
        if partial is not None:
            assert all(x is y for x, y in zip(merged, partial, strict=True)), "the result must be merged in place"
        partial = merged
    assert partial is not None
    truth.check(AttnResult(*partial))


@pytest.mark.parametrize("family", ["causal", "empty_rows", "shared_prefix", "random_cross", "nothing"])
def test_accumulating_into_dq(backend: Backend, dtype: torch.dtype, device: str, family: str) -> None:
    case = KernelCase(family, dtype, head_dim=40, head_dim_v=24, softcap=20.0)
    (inputs, truth), whole = solve(case, device), case.slices.kernel_mask()
    out, lse, _ = backend.forward(inputs.q, inputs.k, inputs.v, whole, case.settings)
    lse, delta = row_statistics(out, lse, inputs)
    dq = torch.zeros_like(inputs.q, dtype=accumulation_dtype(dtype))
    dk, dv = [], []
    for keys, mask in key_parts(whole, [50, 51, 51, 140]):
        k, v = inputs.k[keys], inputs.v[keys]
        grads = backend.backward(
            inputs.dout, inputs.q, k, v, lse, delta, mask, case.settings, dq=dq, grad_dtype=torch.float32
        )
        assert grads[0] is dq, "the gradient of q must be added in place"
        dk.append(grads[1])
        dv.append(grads[2])
    dk_all, dv_all = torch.cat(dk).to(dq.dtype), torch.cat(dv).to(dq.dtype)
    if dtype == torch.float64:
        # Asked for in float32, so only as exact as that.
        assert truth.oracle.dk is not None and truth.oracle.dv is not None
        torch.testing.assert_close(dk_all, truth.oracle.dk, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dv_all, truth.oracle.dv, rtol=1e-6, atol=1e-6)
        truth.check(AttnResult(dq=dq))
    else:
        truth.check(AttnResult(dq=dq, dk=dk_all, dv=dv_all))


def test_lse_may_hold_more_than_these_cells(backend: Backend, dtype: torch.dtype, device: str) -> None:
    """With a larger lse (of other keys, or sinks) probabilities shrink by exp of the difference; where it is -inf they are 0."""
    case = KernelCase("varlen_full", dtype, head_dim=32)
    inputs, mask = make_inputs(case, device), case.slices.kernel_mask()
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    lse = backend.forward(q, k, v, mask, case.settings).lse
    zero = torch.zeros_like(lse)
    dv = backend.backward(dout, q, k, v, lse, zero, mask, case.settings)[2]
    dv_less = backend.backward(dout, q, k, v, lse + math.log(4), zero, mask, case.settings)[2]
    # float32 rounds lse + log 4 to about 5e-7, which may turn the rounding of a probability to a 16-bit number.
    atol = 1e-6 if dtype.itemsize > 2 else 1e-4
    torch.testing.assert_close(dv_less, dv / 4, rtol=3e-6, atol=atol)
    grads = backend.backward(dout, q, k, v, torch.full_like(lse, -math.inf), zero, mask, case.settings)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (5, 7)], ids=lambda lengths: f"{lengths[0]}q{lengths[1]}k")
def test_no_cells(backend: Backend, dtype: torch.dtype, device: str, lengths: tuple[int, int]) -> None:
    (num_q, num_k), wide = lengths, accumulation_dtype(dtype)
    q, k = torch.randn(num_q, 4, 16, device=device).to(dtype), torch.randn(num_k, 2, 16, device=device).to(dtype)
    v, dout = torch.randn(num_k, 2, 8, device=device).to(dtype), torch.randn(num_q, 4, 8, device=device).to(dtype)
    mask = KernelMask(np.empty((0, 6), np.int64), num_q, num_k)
    settings = AttnSettings(softmax_scale=0.25, return_max_logits=True)
    out, lse, max_logits = backend.forward(q, k, v, mask, settings)
    assert out.shape == dout.shape and (out == 0).all() and lse.shape == (num_q, 4) and (lse == -math.inf).all()
    assert max_logits is not None and max_logits.shape == (4,) and (max_logits == -math.inf).all()
    grads = backend.backward(dout, q, k, v, lse, torch.zeros_like(lse), mask, settings)
    assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, (q, k, v), strict=True))
    # Nothing merged into something leaves it as it was.
    one = Partial(torch.ones(num_q, 4, 8, dtype=wide, device=device), torch.ones_like(lse), torch.ones_like(max_logits))
    backend.forward(q, k, v, mask, settings, into=one)
    assert all((x == 1).all() for x in one if x is not None)
    dq = torch.ones(num_q, 4, 16, dtype=wide, device=device)
    backend.backward(dout, q, k, v, lse, torch.zeros_like(lse), mask, settings, dq=dq)
    assert (dq == 1).all()


def test_same_inputs_same_bits(backend: Backend, dtype: torch.dtype, device: str) -> None:
    case = KernelCase("shared_prefix", dtype, 301, 8, 2, head_dim=40)
    inputs = make_inputs(case, device)
    # A mask each, so that nothing kept from the first run is used in the second.
    first, second = (run_kernel(backend, inputs, case.slices.kernel_mask(), case.settings) for _ in range(2))
    for name, x in vars(first).items():
        assert x is None or torch.equal(x, getattr(second, name)), f"{name} differs from one run to the next"


def test_a_mask_is_used_again_with_other_shapes(backend: Backend, device: str) -> None:
    """What a backend keeps with a mask must not tie the mask to the first call's heads, head_dim or dtype."""
    mask = KernelCase("random_a").slices.kernel_mask()
    for dtype, heads, head_dim in (
        (torch.float32, (4, 2), 16),
        (torch.bfloat16, (2, 2), 64),
        (torch.float32, (16, 1), 128),
    ):
        case = KernelCase("random_a", dtype, 193, *heads, head_dim=head_dim)
        inputs, truth = solve(case, device)
        truth.check(run_kernel(backend, inputs, mask, case.settings))
