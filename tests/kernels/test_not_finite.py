"""NaN and infinity in a row of an input reach what attends it, or is attended by it, and nothing else.

Logits of any finite size give finite gradients.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
from magi_attention.kernels.interface import Backend
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.testing.kernel_check import (
    KernelCase,
    KernelInputs,
    key_parts,
    make_inputs,
    row_statistics,
    run_kernel,
)
from magi_attention.testing.mask_families import Slices
from magi_attention.testing.oracle import AttnResult

FAMILIES = ("varlen_full", "varlen_causal", "inv_causal", "bi_causal", "window", "cross_documents", "empty_rows")
# Triton kernels keep what is not finite in its slice's rectangle of queries and keys, the others in its cells.
EXACT = ("reference", "tiled", "cpu")
_POISONED = 20, 37, 60
_VALUES = ((math.nan, True), (math.inf, False), (-math.inf, False))  # whether all of a row, or one number of one head

# The interpreter multiplies by numpy, which warns of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def _reach(slices: Slices, bad: str, exact: bool) -> dict[str, Tensor]:
    """By result, ``[num_q]`` or ``[num_k]`` bool: the rows that poison in rows `_POISONED` of an input may reach."""
    rows = slices.rows if exact else tuple((*row[:4], 0) for row in slices.rows)
    cells = Slices(rows, slices.num_q, slices.num_k).dense()
    rows_bad = list(_POISONED)
    queries = torch.zeros(slices.num_q, dtype=torch.bool)
    if bad in ("k", "v"):
        queries = cells[:, rows_bad].any(dim=1)
    else:
        queries[rows_bad] = cells[rows_bad].any(dim=1)
    keys = cells[queries].any(dim=0)
    forward = queries if bad != "dout" else torch.zeros_like(queries)
    return {"out": forward, "lse": forward, "dq": queries, "dk": keys, "dv": keys}


def _check_reach(actual: AttnResult, clean: AttnResult, reach: dict[str, Tensor], dtype: torch.dtype) -> None:
    tolerance = 2e-5 if accumulation_dtype(dtype) == torch.float32 else 1e-12
    if dtype.itemsize == 2:
        tolerance = 2e-2  # probabilities are rounded to the inputs' dtype where tiles differ
    for name, rows in reach.items():
        x, y = getattr(actual, name), getattr(clean, name)
        kept = ~rows.to(x.device)
        torch.testing.assert_close(x[kept], y[kept], rtol=tolerance, atol=tolerance, msg=f"{name} of rows out of reach")


def _poison(inputs: KernelInputs, bad: str, value: float, whole_row: bool) -> KernelInputs:
    poisoned = inputs.clone()
    x = getattr(poisoned, bad)
    for row in _POISONED:
        if whole_row:
            x[row] = value
        else:
            x[row, -1, 3] = value
    return poisoned


def _interprets(backend: Backend, device: str) -> bool:
    """Whether a call takes seconds, so that few must do."""
    return backend.name == "triton" and device == "cpu"


def _check_nan_is_seen(actual: AttnResult, slices: Slices, bad: str) -> None:
    for name, rows in _reach(slices, bad, exact=True).items():
        if bad == "v" and name in ("lse", "dv"):  # which do not depend on it
            continue
        x = getattr(actual, name)
        seen = x[rows.to(x.device)].isnan()
        assert seen.flatten(1).any(dim=1).all(), f"{name} hides NaN of {bad}"


@pytest.mark.parametrize("bad", ["q", "k", "v", "dout"])
def test_poison_reaches_what_attends_it(backend: Backend, dtype: torch.dtype, device: str, bad: str) -> None:
    """Heads of a group; with a softcap for some inputs."""
    few = _interprets(backend, device)
    for family in ("varlen_causal", "empty_rows") if few else FAMILIES:
        heads = (2, 1) if few else (4, 2)
        softcap = 5.0 if bad in ("k", "dout") else 0.0
        case = KernelCase(family, dtype, 97, *heads, head_dim=24, softcap=softcap)
        inputs, slices = make_inputs(case, device), case.slices
        mask = slices.kernel_mask()
        clean = run_kernel(backend, inputs, mask, case.settings)
        exact = backend.name in EXACT
        reach = _reach(slices, bad, exact)
        for value, whole_row in _VALUES[:1] if few else _VALUES:
            actual = run_kernel(backend, _poison(inputs, bad, value, whole_row), mask, case.settings)
            _check_reach(actual, clean, reach, dtype)
            if math.isnan(value) and exact:
                _check_nan_is_seen(actual, slices, bad)


@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_poison_beside_sinks(layout: str) -> None:
    """NaN in a document's keys, and in dout of rows that attend nothing, stays out of what other rows give to sinks."""
    tokens, heads = 40, 2
    generator = torch.Generator().manual_seed(0)
    q_ranges = k_ranges = torch.tensor([[0, 16], [16, 36]], dtype=torch.int32)  # rows from 36 on attend nothing
    rows = torch.arange(tokens)
    inputs = [torch.randn(tokens, heads, 16, generator=generator) for _ in range(4)]
    sink = torch.randn(*((tokens,) if layout == "ssh" else ()), 3, heads, generator=generator)

    def run(bad_keys: Tensor, bad_dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, dout = (x.clone() for x in inputs)
        k[bad_keys], v[bad_keys], dout[bad_dout] = math.nan, math.nan, math.nan
        leaves = q, k, v, own_sink = [x.requires_grad_() for x in (q, k, v, sink.clone())]
        types = torch.ones(2, dtype=torch.int32)
        out, meta = flex_flash_attn_func(q, k, v, q_ranges, k_ranges, types, sink=own_sink, sink_layout=layout)
        assert meta.lse is not None
        return out.detach(), meta.lse.detach(), *torch.autograd.grad(out, leaves, dout)

    nothing, idle = rows < 0, rows >= 36
    clean, with_idle = run(nothing, nothing), run(nothing, idle)
    torch.testing.assert_close(with_idle[1:-1], clean[1:-1], rtol=2e-5, atol=2e-5)
    # The gradient of a sink of an idle row: its value is 0 whatever the sink.
    torch.testing.assert_close(with_idle[-1], clean[-1], rtol=2e-5, atol=2e-5)
    poisoned = run(rows == 20, nothing)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), poisoned, clean, strict=False):
        kept = (rows < 16) | (name in ("out", "lse", "dq")) & (rows < 20)
        torch.testing.assert_close(x[kept], y[kept], rtol=2e-5, atol=2e-5, msg=f"{name} of another document")
    assert poisoned[0][20:36].isnan().flatten(1).any(dim=1).all()
    if layout == "ssh":
        kept = (rows < 20) | idle
        torch.testing.assert_close(poisoned[-1][kept], clean[-1][kept], rtol=2e-5, atol=2e-5)
        assert poisoned[-1][20:36].isnan().flatten(1).any(dim=1).all()


@pytest.mark.parametrize("bad", ["k", "v"])
def test_poison_merged_from_parts(backend: Backend, dtype: torch.dtype, device: str, bad: str) -> None:
    """`into=` and `dq=`: keys in parts, as stages are."""
    case = KernelCase("varlen_causal", dtype, 97, *((2, 1) if _interprets(backend, device) else (4, 2)), head_dim=24)
    slices, inputs = case.slices, make_inputs(case, device)
    parts = key_parts(slices.kernel_mask(), [30] if _interprets(backend, device) else [30, 55])

    def run(x: KernelInputs) -> AttnResult:
        partial = None
        for keys, mask in parts:
            partial = backend.forward(x.q, x.k[keys], x.v[keys], mask, case.settings, into=partial)
        assert partial is not None
        statistics = row_statistics(partial.out, partial.lse, x)
        dq, dk, dv = torch.zeros_like(x.q, dtype=partial.lse.dtype), [], []
        for keys, mask in parts:
            made = backend.backward(x.dout, x.q, x.k[keys], x.v[keys], *statistics, mask, case.settings, dq=dq)
            dk.append(made[1])
            dv.append(made[2])
        return AttnResult(partial.out, partial.lse, None, dq, torch.cat(dk), torch.cat(dv))

    actual = run(_poison(inputs, bad, math.nan, True))
    _check_reach(actual, run(inputs), _reach(slices, bad, backend.name in EXACT), dtype)


def test_rows_that_attend_nothing_take_no_part(backend: Backend, dtype: torch.dtype, device: str) -> None:
    """Whatever their q, dout and delta hold, and k and v of keys that nothing attends: no gradient of anything changes."""
    case = KernelCase("empty_rows", dtype, 97, *((2, 1) if _interprets(backend, device) else (4, 2)), head_dim=24)
    inputs, attended = make_inputs(case, device), case.slices.dense()
    mask, idle_q, idle_k = case.slices.kernel_mask(), ~attended.any(dim=1), ~attended.any(dim=0)
    clean, poisoned = run_kernel(backend, inputs, mask, case.settings), inputs.clone()
    assert idle_q.any()
    for x, idle in ((poisoned.q, idle_q), (poisoned.dout, idle_q), (poisoned.k, idle_k), (poisoned.v, idle_k)):
        x[idle.to(device)] = math.nan
    actual = run_kernel(backend, poisoned, mask, case.settings)  # so delta is 0 * NaN in these rows
    nothing = {name: torch.zeros(97, dtype=torch.bool) for name in ("out", "lse", "dq", "dk", "dv")}
    _check_reach(actual, clean, nothing, dtype)
    assert actual.dq is not None and (actual.dq[idle_q.to(device)] == 0).all()


@pytest.mark.parametrize(
    ("magnitude", "softcap"), [(1e7, 0.0), (6e7, 0.0), (1e12, 0.0), (1e30, 0.0), (2.9e38, 0.0), (6e7, 1e9), (1e12, 1e9)]
)
def test_logits_of_any_size(
    backend: Backend, dtype: torch.dtype, device: str, magnitude: float, softcap: float
) -> None:
    """Gradients of v are sums of dout by weights that are at most 1; GPU kernels keep to that, and the others are right too."""
    if backend.name == "triton" and magnitude > 2.3e38:
        pytest.skip("Triton's logits are in units of log 2: they overflow 1.44 times as early")
    tokens, heads = 49, 2
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(tokens, heads, 40, generator=generator).to(device, dtype) for _ in range(4))
    largest = torch.einsum("ihd,jhd->hij", q.double(), k.double()).abs().max().item()
    case = KernelCase(
        "causal", dtype, tokens, heads, heads, head_dim=40, softcap=softcap, softmax_scale=magnitude / largest
    )
    result = run_kernel(backend, KernelInputs(q, k, v, dout), case.slices.kernel_mask(), case.settings)
    assert all(x is not None and x.isfinite().all() for x in (result.out, result.lse, result.dv))
    assert result.dv is not None and result.out is not None
    bound = dout.double().abs().sum(dim=0)
    assert (result.dv.double().abs() <= bound * 1.01).all()
    if backend.name not in EXACT:
        return
    # Each query attends the key of its largest logit alone: so far apart are they.
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double()).masked_fill(~case.slices.dense(), -math.inf)
    weights = torch.nn.functional.one_hot(logits.argmax(dim=-1), tokens).double()
    if softcap == 0:
        torch.testing.assert_close(
            result.out.double(), torch.einsum("hij,jhe->ihe", weights, v.double()), rtol=1e-2, atol=1e-2
        )
        torch.testing.assert_close(
            result.dv.double(), torch.einsum("hij,ihe->jhe", weights, dout.double()), rtol=1e-2, atol=1e-2
        )
