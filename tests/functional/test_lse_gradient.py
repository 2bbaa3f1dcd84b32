"""The gradient of lse, as a z-loss needs it, and gradients of rows that attend nothing, against the float64 oracle.

Shapes: num_q, num_k tokens; hq heads; d head dim.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.row_dots import row_deltas, row_dots
from magi_attention.testing.kernel_check import KernelCase, KernelInputs, make_inputs
from magi_attention.testing.mask_families import Slices
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

NUM_TOKENS = 61
SINKS = [None, "sh", "ssh"]
BACKENDS = [("reference", torch.float64), ("tiled", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]


def make_sink(layout: str | None, num_q: int, hq: int) -> Tensor | None:
    if layout is None:
        return None
    shape = (2, hq) if layout == "sh" else (num_q, 2, hq)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def make_dlse(inputs: KernelInputs) -> Tensor:
    dtype = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    return torch.randn(inputs.q.shape[:2], generator=torch.Generator().manual_seed(8)).to(dtype)


def differentiate(
    inputs: KernelInputs, slices: Slices, dout: Tensor | None, dlse: Tensor | None, sink: Tensor | None, **options: Any
) -> AttnResult:
    """Gradients of one backward in which out, lse or both are used."""
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if sink is not None:
        leaves.append(sink.clone().requires_grad_())
        options["sink"] = leaves[-1]
    out, meta = flex_flash_attn_func(*leaves[:3], *slices.tables(), return_max_logits=True, **options)
    assert meta.lse is not None and meta.max_logits is not None and not meta.max_logits.requires_grad
    used = [(x, grad) for x, grad in ((out, dout), (meta.lse, dlse)) if grad is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return AttnResult(out.detach(), meta.lse.detach(), meta.max_logits, *(leaf.grad for leaf in leaves))


def check(
    inputs: KernelInputs, slices: Slices, dout: Tensor | None, dlse: Tensor | None, sink: Tensor | None, **options: Any
) -> None:
    actual = differentiate(inputs, slices, dout, dlse, sink, **options)
    tensors = (inputs.q, inputs.k, inputs.v, slices.dense())
    options |= {"dout": dout, "dlse": dlse, "sink": sink}
    assert_results_as_exact(actual, attention_oracle(*tensors, **options), plain_result(*tensors, **options))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("layout", SINKS)
@pytest.mark.parametrize("family", ["varlen_causal", "empty_rows", "cross_documents", "nothing"])
def test_lse_is_differentiable(
    family: str, layout: str | None, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", backend)
    case = KernelCase(family, dtype, NUM_TOKENS, head_dim=16, head_dim_v=24)
    inputs, slices = make_inputs(case), case.slices
    sink, dlse = make_sink(layout, slices.num_q, case.num_heads_q), make_dlse(inputs)
    extra: dict[str, Any] = {} if layout is None else {"sink_layout": layout}
    for softcap in (0.0, 3.0):
        check(inputs, slices, inputs.dout, dlse, sink, softcap=softcap, **extra)
        check(inputs, slices, None, dlse, sink, softcap=softcap, **extra)


@pytest.mark.parametrize("layout", SINKS)
def test_gradients_by_finite_differences(layout: str | None) -> None:
    """The signs of delta and of the sink's share, from no formula at all."""
    slices = Slices(((0, 5, 0, 7, 1), (6, 9, 2, 7, 0)), 9, 7)  # row 5 attends nothing
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 2, 4), (7, 1, 4), (7, 1, 3))
    ]
    sink = make_sink(layout, 9, 2)
    leaves += [] if sink is None else [sink.double()]

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, meta = flex_flash_attn_func(q, k, v, *slices.tables(), sink=sink, sink_layout=layout or "sh")
        assert meta.lse is not None
        return out, meta.lse if layout else meta.lse.masked_fill(meta.lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("layout", SINKS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_attend_nothing_ignore_their_gradients(
    value: float, layout: str | None, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", backend)
    case = KernelCase("empty_rows", dtype, NUM_TOKENS, head_dim=16)
    inputs, slices = make_inputs(case), case.slices
    sink, dlse = make_sink(layout, slices.num_q, case.num_heads_q), make_dlse(inputs)
    options: dict[str, Any] = {} if layout is None else {"sink_layout": layout}
    dead = ~slices.dense().any(dim=1)
    assert dead.any() and not dead.all()
    dout = inputs.dout.clone()
    dout[dead] = value
    if sink is None:
        bad_dlse = dlse.clone()
        bad_dlse[dead] = value
    else:
        bad_dlse = dlse  # it is the sink's there, and counts
    for with_lse in (False, True):
        expected = differentiate(inputs, slices, inputs.dout, dlse if with_lse else None, sink, **options)
        actual = differentiate(inputs, slices, dout, bad_dlse if with_lse else None, sink, **options)
        for name in ("dq", "dk", "dv", "dsink"):
            x, y = getattr(expected, name), getattr(actual, name)
            assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name


def test_a_z_loss_over_rows_that_attend_nothing() -> None:
    """Without a sink their lse is -inf, and so is the gradient that a square gives them."""
    case = KernelCase("empty_rows", torch.float32, NUM_TOKENS, head_dim=16)
    inputs, slices = make_inputs(case), case.slices
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    _, meta = flex_flash_attn_func(q, k, v, *slices.tables())
    assert meta.lse is not None
    meta.lse.square().sum().backward()
    dense = slices.dense()
    dlse = 2 * meta.lse.detach().masked_fill(~dense.any(dim=1)[:, None], 0.0)
    options: dict[str, Any] = {"dlse": dlse, "dout": torch.zeros_like(inputs.dout)}
    truth = attention_oracle(inputs.q, inputs.k, inputs.v, dense, **options)
    plain = plain_result(inputs.q, inputs.k, inputs.v, dense, **options)
    assert v.grad is not None and (v.grad == 0).all()
    assert_results_as_exact(AttnResult(dq=q.grad, dk=k.grad), truth, plain)


class _Recorded(TorchDispatchMode):
    """The names of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_runs_for_an_lse_that_is_not_used() -> None:
    out, dout, lse = torch.randn(9, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2)
    with _Recorded() as plain:
        row_dots(out, dout)
    with _Recorded() as unused:
        row_deltas(out, lse, dout, None)
    assert unused.names == plain.names


def test_lse_only_on_what_requires_grad() -> None:
    case = KernelCase("causal", torch.float32, NUM_TOKENS, head_dim=16)
    inputs, slices = make_inputs(case), case.slices
    _, meta = flex_flash_attn_func(inputs.q, inputs.k, inputs.v, *slices.tables())
    assert meta.lse is not None and not meta.lse.requires_grad
    k = inputs.k.clone().requires_grad_()
    _, meta = flex_flash_attn_func(inputs.q, k, inputs.v, *slices.tables())
    assert meta.lse is not None
    meta.lse.sum().backward()
    assert k.grad is not None and inputs.q.grad is None and inputs.v.grad is None
