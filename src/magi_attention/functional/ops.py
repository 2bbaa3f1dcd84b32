"""One-device attention as operators of torch: what `torch.compile`, export and selective checkpointing see of a call.

    magi_attention::flex_flash_attn             forward, with a formula for its gradient
    magi_attention::flex_flash_attn_backward    that formula, once differentiable; dlse is None where lse is not used

Which kernel computes, and what the environment asks, is decided when they run, not when a graph is made of them.

Shapes: num_q, num_k tokens; hq, hk heads (hq % hk == 0); d, dv head dims of q/k and of v; n slices. An output that is not there (no sinks,
no max logits asked for) has no elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from magi_attention import env
from magi_attention.common.tensor_kinds import is_watched
from magi_attention.functional.masks import is_capturing, kernel_mask
from magi_attention.functional.once_differentiable import as_once_differentiable, refusal
from magi_attention.functional.sink import apply_sink, sink_gradient
from magi_attention.kernels.interface import AttnSettings, Backend, KernelMask
from magi_attention.kernels.precision import accumulation_dtype
from magi_attention.kernels.registry import pick
from magi_attention.kernels.row_dots import row_deltas

# torch keeps compiled graphs on disk, by the operators in them and their arguments: it does not see how
# an operator is differentiated. Raise this with every change of a gradient, or graphs of an older
# version give the older gradient (version 1 dropped that of lse).
GRADIENT_VERSION = 2

_MASK = "Tensor q_ranges, Tensor k_ranges, Tensor? attn_type_map"
_OPTIONS = "Tensor? sink, str sink_layout, float softmax_scale, float softcap, bool deterministic"
_FORWARD = (
    f"(Tensor q, Tensor k, Tensor v, {_MASK}, {_OPTIONS}, bool return_max_logits, int gradient_version)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MASK}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class _Options(NamedTuple):
    """As the operators take them, behind the tensors and the mask."""

    sink: Tensor | None
    sink_layout: str
    softmax_scale: float
    softcap: float
    deterministic: bool

    def settings(self, return_max_logits: bool = False) -> AttnSettings:
        deterministic = self.deterministic or env.deterministic_mode()
        return AttnSettings(self.softmax_scale, self.softcap, deterministic, return_max_logits)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mask = kernel_mask(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0])
    *others, return_max_logits, _ = options
    return _run_forward(q, k, v, mask, _Options(*others), return_max_logits)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: KernelMask, options: _Options, return_max_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out [num_q, hq, dv], lse [num_q, hq], max_logits [hq] or [0])``; see `flex_flash_attn_func`."""
    settings, sink = options.settings(return_max_logits), options.sink
    q, k, v = (as_last_contiguous(x) for x in (q, k, v))
    # Sinks rescale the output: it is rounded to q's dtype only after that.
    out_dtype = q.dtype if sink is None else accumulation_dtype(q.dtype)
    out, lse, max_logits = _backend(q, k, v, settings).forward(q, k, v, mask, settings, out_dtype=out_dtype)
    if sink is not None:
        out, lse = apply_sink(out, lse, sink, options.sink_layout)
        out = out.to(q.dtype)
    return out.contiguous(), lse.contiguous(), lse.new_empty(0) if max_logits is None else max_logits


forward_operator = torch.library.custom_op("magi_attention::flex_flash_attn", _attend, mutates_args=(), schema=_FORWARD)


def flex_flash_attn(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, of the inputs that `FlexFlashAttention` takes too."""
    output: tuple[Tensor, Tensor, Tensor] = forward_operator(*inputs, GRADIENT_VERSION)
    return output


@forward_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    return_max_logits: bool,
    gradient_version: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_q, hq, _), wide = q.shape, accumulation_dtype(q.dtype)
    return (
        q.new_empty(num_q, hq, v.shape[2]),
        q.new_empty(num_q, hq, dtype=wide),
        q.new_empty(hq if return_max_logits else 0, dtype=wide),
    )


def _attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = kernel_mask(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0])
    return _run_backward(dout, q, k, v, lse, row_deltas(out, lse, dout, dlse), mask, _Options(*options))


def _run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, mask: KernelMask, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of the shapes and dtypes of q, k, v, and ``dsink`` of the sink's, or ``[0]``."""
    settings, sink = options.settings(), options.sink
    dout, q, k, v = (as_last_contiguous(x) for x in (dout, q, k, v))
    backend = _backend(q, k, v, settings)
    dq, dk, dv = backend.backward(dout, q, k, v, lse, delta, mask, settings, grad_dtype=q.dtype)
    dsink = lse.new_empty(0) if sink is None else sink_gradient(lse, sink, delta, options.sink_layout).to(sink.dtype)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dsink.contiguous()


flex_flash_attn_backward = torch.library.custom_op(
    "magi_attention::flex_flash_attn_backward", _attend_backward, mutates_args=(), schema=_BACKWARD
)


@flex_flash_attn_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor | None,
    sink: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = lse.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, q_ranges, k_ranges, attn_type_map, *options = inputs
    sink, *ctx.options = options[: len(_Options._fields)]
    out, lse, max_logits = output
    ctx.save_for_backward(q, k, v, out, lse, q_ranges, k_ranges, attn_type_map, sink)
    ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: object, mask: KernelMask | None = None
) -> tuple[Tensor | None, ...]:
    """``mask``: of the tables that were saved, where it is known."""
    if dout is None and dlse is None:
        return (None,) * 13
    # Once: hooks that offload or recompute what was saved pay for every reading.
    q, k, v, out, lse, q_ranges, k_ranges, attn_type_map, sink = ctx.saved_tensors
    inputs = (dout, dlse, q, k, v, sink)
    options = _Options(sink, *ctx.options)
    dout = torch.zeros_like(out) if dout is None else dout
    if mask is None:
        grads = flex_flash_attn_backward(dout, dlse, q, k, v, out, lse, q_ranges, k_ranges, attn_type_map, *options)
    else:
        with torch.no_grad():
            grads = _run_backward(dout, q, k, v, lse, row_deltas(out, lse, dout, dlse), mask, options)
        grads = as_once_differentiable("flex_flash_attn_func", grads, inputs)
    dq, dk, dv, dsink = grads
    return dq, dk, dv, None, None, None, None if sink is None else dsink, *(None,) * 6


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise refusal("flex_flash_attn_func")


forward_operator.register_autograd(_differentiate, setup_context=_save)
flex_flash_attn_backward.register_autograd(_refuse)


class FlexFlashAttention(torch.autograd.Function):
    """A call that is not compiled.

    The operators, which cost the host several times what this does, and a second to import the compiler, serve only where
    somebody looks on, as selective checkpointing does.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, q_ranges, k_ranges, attn_type_map, *options, return_max_logits = inputs
        ctx.mask = None
        if is_watched():
            output = flex_flash_attn(*inputs)
        else:
            ctx.mask = kernel_mask(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0])
            ctx.device, ctx.is_captured = q.device, is_capturing(q.device)
            output = _run_forward(q, k, v, ctx.mask, _Options(*options), return_max_logits)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mask = None if is_watched() else ctx.mask
        if mask is not None and ctx.is_captured != is_capturing(ctx.device):
            mask = None  # lists that a graph makes are there when it is replayed, and not for others
        return _differentiate(ctx, *grads, mask=mask)


def as_last_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _backend(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> Backend:
    return pick(q, k, v, settings, name=env.backend())
