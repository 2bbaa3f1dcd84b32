"""The Hopper backend: its lists against the dense mask anywhere, its kernels against the float64 oracle on a Hopper GPU.

The suite of the other backends asks for head dims and dtypes that this one leaves to them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from magi_attention.kernels import hopper
from magi_attention.kernels.hopper.descriptors import why_not
from magi_attention.kernels.hopper.segments import SegmentList, build_segments
from magi_attention.kernels.hopper.walks import choose_walk
from magi_attention.kernels.interface import AttnSettings, KernelMask, Partial
from magi_attention.kernels.registry import pick
from magi_attention.kernels.triton.work_lists import transpose
from magi_attention.testing.kernel_check import (
    KernelCase,
    KernelInputs,
    check_kernel,
    key_parts,
    make_inputs,
    row_statistics,
    run_kernel,
    solve,
)
from magi_attention.testing.mask_families import MASK_FAMILIES
from magi_attention.testing.oracle import AttnResult

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU; Gluon has no interpreter")
HALF = (torch.bfloat16, torch.float16)
SETTINGS = AttnSettings(softmax_scale=0.125)


def cells(work: SegmentList, num_q: int, num_k: int, tile: int, block: int, step: int) -> np.ndarray:
    """How often each cell is visited, walking a list as the kernels do, from multiples of ``step``, unmasked where they do not mask."""
    count = np.zeros((num_q, num_k + block), np.int64)
    segments = work.segments.tolist()
    for at in range(work.num_tiles):
        queries = np.arange(at * tile, min((at + 1) * tile, num_q))[:, None]
        for k0, k1, inner_begin, inner_end, lo, hi, q0, q1 in segments[work.rows[at] : work.rows[at + 1]]:
            for start in range(k0 // step * step, k1, block):
                keys = np.arange(start, start + block)[None]
                inside = (
                    (keys >= k0)
                    & (keys < k1)
                    & (keys - queries >= lo)
                    & (keys - queries <= hi)
                    & (queries >= q0)
                    & (queries < q1)
                )
                if start >= inner_begin and start + block <= inner_end:
                    inside = np.ones_like(inside)
                count[queries, keys] += inside
    assert not count[:, num_k:].any()
    return count[:, :num_k]


@given(
    st.sampled_from(sorted(MASK_FAMILIES)),
    st.integers(16, 90),
    st.sampled_from([(8, 4), (16, 16), (32, 8)]),
    st.booleans(),
)
def test_segments_visit_what_is_attended(family: str, num_tokens: int, sizes: tuple[int, int], by_key: bool) -> None:
    slices, (tile, block) = MASK_FAMILIES[family](num_tokens), sizes
    mask, dense = slices.kernel_mask(), slices.dense().numpy().astype(np.int64)
    bands, lengths = (transpose(mask.bands), (mask.num_k, mask.num_q)) if by_key else (mask.bands, dense.shape)
    work = build_segments(bands, lengths[0], tile, block)
    assert np.array_equal(cells(work, *lengths, tile, block, 4 if by_key else 1), dense.T if by_key else dense)
    assert sorted(work.order.tolist()) == list(range(work.num_tiles))
    assert (work.rows[1:] > work.rows[:-1]).all(), "kernels want a segment in every tile"


@pytest.mark.parametrize(
    ("rows", "in_step"),
    [
        ([[0, 1024, 0, 1024, -1023, 0]], True),
        ([[0, 400, 0, 400, -399, 0], [400, 1024, 400, 1024, -623, 0]], True),
        ([[0, 1024, 0, 1024, -255, 0]], False),
        ([[0, 1024, 0, 1024, -1023, 1023]], False),
    ],
    ids=["causal", "documents", "window", "full"],
)
def test_which_masks_are_walked_in_step(rows: list[list[int]], in_step: bool) -> None:
    work = build_segments(transpose(np.array(rows)), 1024, 128, 64)
    assert choose_walk(work, 8, 4, 132) == (8, in_step)
    assert choose_walk(work, 8, 1, 132) == (8, False), "heads of one group are walked in turn: there is one"
    assert choose_walk(work, 8, 4, 8)[1] is False
    assert choose_walk(replace(work, longest=5 / 16.5), 8, 4, 132)[0] == 4, "not 5, then 3"


def test_a_window_takes_the_fewest_blocks() -> None:
    window = np.array([[0, 4096, 0, 4096, -1023, 0]])
    rows = build_segments(window, 4096, 128, 128).segments.numpy()
    blocks = -(-(rows[:, 1] - rows[:, 0]) // 128)
    assert blocks.max() == 9  # 1023 + 128 keys


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.flatten(), None),
        (lambda x: x[:, :, 1:65], "multiples of 16 bytes"),
        (lambda x: x[:, :, ::2], "last axis must be contiguous"),
        (lambda x: x[:1].expand(7, -1, -1), "must not be expanded"),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), None),
        (lambda x: x[:, :, :64], None),
    ],
)
def test_what_the_copy_engine_refuses(make: object, words: str | None) -> None:
    x = make(torch.zeros(7, 3, 128, dtype=torch.bfloat16))  # type: ignore[operator]
    reason = why_not("k", x if x.dim() == 3 else x.view(7, 3, 128))
    assert (reason is None) == (words is None) and (words is None or words in str(reason))


def test_without_a_hopper_gpu_it_says_so() -> None:
    x = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'hopper' cannot serve this call: it runs on Hopper GPUs"):
        pick(x, x, x, SETTINGS, name="hopper")


@on_hopper
def test_what_it_takes() -> None:
    x = torch.zeros(2, 1, 128, dtype=torch.bfloat16, device="cuda")
    assert pick(x, x, x, SETTINGS).name == "hopper"
    assert pick(x, x, x, replace(SETTINGS, softcap=3.0)).name == "triton"
    for inputs, settings, words in (
        ((x, x, x), replace(SETTINGS, softcap=3.0), "softcap"),
        ((x, x, x), replace(SETTINGS, softmax_scale=-1.0), "positive softmax scales"),
        ((x.float(), x.float(), x.float()), SETTINGS, "got torch.float32"),
        ((x, x, x[:, :, :64]), SETTINGS, "got 128 and 64"),
        ((x[:, :, :80], x[:, :, :80], x[:, :, :80]), SETTINGS, "got 80 and 80"),
    ):
        assert words in str(hopper.unsupported(*inputs, settings))


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", MASK_FAMILIES)
def test_mask(family: str, dtype: torch.dtype, head_dim: int) -> None:
    for num_tokens, heads in ((193, (4, 2)), (1009, (8, 2))):
        case = KernelCase(family, dtype, num_tokens, *heads, head_dim=head_dim, deterministic=False)
        check_kernel(hopper, case, "cuda")


@on_hopper
@pytest.mark.parametrize("num_tokens", [16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_lengths(num_tokens: int) -> None:
    for family in ("causal", "more_keys", "more_queries", "random_cross"):
        check_kernel(hopper, KernelCase(family, torch.bfloat16, num_tokens, head_dim=128, deterministic=False), "cuda")


@on_hopper
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1), (20, 5)])
def test_heads(heads: tuple[int, int]) -> None:
    check_kernel(hopper, KernelCase("shared_prefix", torch.float16, 97, *heads, deterministic=False), "cuda")


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", ["causal", "varlen_causal", "window"])
def test_programs_that_wait_for_others(family: str, head_dim: int) -> None:
    """More tiles and heads than run at a time: those of causal masks that come later walk the other way."""
    case = KernelCase(family, torch.bfloat16, 3301, 16, 8, head_dim=head_dim, deterministic=False)
    check_kernel(hopper, case, "cuda")


@on_hopper
@pytest.mark.parametrize("dtype", HALF)
def test_large_logits(dtype: torch.dtype) -> None:
    case = KernelCase("varlen_block_causal", dtype, head_dim=128, magnitude=100.0, deterministic=False)
    check_kernel(hopper, case, "cuda")


@on_hopper
def test_deterministic_mode_gives_the_same_bits() -> None:
    case = KernelCase("shared_prefix", torch.bfloat16, 301, 8, 2, head_dim=128)
    inputs = make_inputs(case, "cuda")
    first, second = (run_kernel(hopper, inputs, case.slices.kernel_mask(), case.settings) for _ in range(2))
    for name, x in vars(first).items():
        assert x is None or torch.equal(x, getattr(second, name)), f"{name} differs from one run to the next"


@on_hopper
@pytest.mark.parametrize("dtype", HALF)
def test_results_have_the_asked_dtype(dtype: torch.dtype) -> None:
    case = KernelCase("random_b", dtype, head_dim=128, deterministic=False)
    (inputs, truth), mask = solve(case, "cuda"), case.slices.kernel_mask()
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    for asked in (None, dtype):
        out, lse, max_logits = hopper.forward(q, k, v, mask, case.settings, out_dtype=asked)
        statistics = row_statistics(out, lse, inputs)
        grads = hopper.backward(dout.float(), q, k, v, *statistics, mask, case.settings, grad_dtype=asked)
        assert out.dtype == (asked or torch.float32) and [x.dtype for x in grads] == [asked or torch.float32] * 3
        truth.check(AttnResult(out, lse, max_logits, *grads))


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _packed(x: Tensor, left: int, right: int) -> Tensor:
    """The same numbers as the middle columns of a wider buffer of NaN."""
    buffer = torch.full((x.shape[0], left + x[0].numel() + right), math.nan, dtype=x.dtype, device=x.device)
    return buffer[:, left : left + x[0].numel()].unflatten(1, x.shape[1:]).copy_(x)


@on_hopper
def test_strided_inputs() -> None:
    case = KernelCase("prefix_lm", torch.bfloat16, head_dim=128, deterministic=False)
    (inputs, truth), mask = solve(case, "cuda"), case.slices.kernel_mask()
    first = KernelInputs(*(_heads_first(x) for x in vars(inputs).values()))
    packed = KernelInputs(_packed(inputs.q, 8, 0), _packed(inputs.k, 0, 16), _packed(inputs.v, 8, 8), inputs.dout)
    for strided in (first, packed, replace(first, dout=_packed(inputs.dout, 3, 2))):
        assert hopper.unsupported(strided.q, strided.k, strided.v, case.settings) is None
        truth.check(run_kernel(hopper, strided, mask, case.settings))
    expanded = replace(inputs, dout=inputs.dout[:1, :1].expand_as(inputs.dout))
    whole = replace(expanded, dout=expanded.dout.contiguous())
    a, b = (run_kernel(hopper, x, mask, case.settings) for x in (expanded, whole))
    assert a.dk is not None and b.dk is not None and torch.equal(a.dk, b.dk)


@on_hopper
@pytest.mark.parametrize("family", ["causal", "empty_rows", "shared_prefix", "random_cross", "nothing"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_merging_parts(family: str, head_dim: int) -> None:
    """Keys in parts: outputs merged in place, gradients of queries added up in place."""
    case = KernelCase(family, torch.bfloat16, head_dim=head_dim, deterministic=False)
    (inputs, truth), whole = solve(case, "cuda"), case.slices.kernel_mask()
    partial: Partial | None = None
    for keys, mask in key_parts(whole, [50, 51, 51, 140]):
        merged = hopper.forward(inputs.q, inputs.k[keys], inputs.v[keys], mask, case.settings, into=partial)
        assert partial is None or all(x is y for x, y in zip(merged, partial, strict=True))
        partial = merged
    assert partial is not None
    truth.check(AttnResult(*partial))
    lse, delta = row_statistics(partial.out, partial.lse, inputs)
    dq, dk, dv = torch.zeros_like(inputs.q, dtype=torch.float32), [], []
    for keys, mask in key_parts(whole, [50, 51, 51, 140]):
        k, v = inputs.k[keys], inputs.v[keys]
        grads = hopper.backward(inputs.dout, inputs.q, k, v, lse, delta, mask, case.settings, dq=dq)
        assert grads[0] is dq
        dk.append(grads[1])
        dv.append(grads[2])
    truth.check(AttnResult(dq=dq, dk=torch.cat(dk), dv=torch.cat(dv)))


@on_hopper
@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (5, 7)], ids=lambda lengths: f"{lengths[0]}q{lengths[1]}k")
def test_no_cells(lengths: tuple[int, int]) -> None:
    num_q, num_k = lengths
    q, dout = (torch.randn(num_q, 4, 64, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(num_k, 2, 64, device="cuda").bfloat16() for _ in range(2))
    mask = KernelMask(np.empty((0, 6), np.int64), num_q, num_k)
    out, lse, _ = hopper.forward(q, k, v, mask, SETTINGS)
    assert (out == 0).all() and (lse == -math.inf).all()
    grads = hopper.backward(dout, q, k, v, lse, torch.zeros_like(lse), mask, SETTINGS)
    assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, (q, k, v), strict=True))


@on_hopper
def test_rows_without_keys_take_no_part() -> None:
    """Where the lse is -inf, probabilities are 0; with a larger lse (of other keys, or sinks) they shrink."""
    case = KernelCase("varlen_full", torch.bfloat16, head_dim=128, deterministic=False)
    inputs, mask = make_inputs(case, "cuda"), case.slices.kernel_mask()
    q, k, v, dout = inputs.q, inputs.k, inputs.v, inputs.dout
    lse = hopper.forward(q, k, v, mask, case.settings).lse
    zero = torch.zeros_like(lse)
    dv = hopper.backward(dout, q, k, v, lse, zero, mask, case.settings)[2]
    # A power of two, so that probabilities are rounded alike.
    dv_less = hopper.backward(dout, q, k, v, lse + math.log(4), zero, mask, case.settings)[2]
    torch.testing.assert_close(dv_less, dv / 4, rtol=2e-2, atol=1e-3)
    grads = hopper.backward(dout, q, k, v, torch.full_like(lse, -math.inf), zero, mask, case.settings)
    assert all((grad == 0).all() for grad in grads)
