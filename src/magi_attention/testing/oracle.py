"""The truth that tests compare with: attention of a boolean matrix, by autograd, in any dtype.

Written from the contract alone, and sharing no code with the kernels or the band table.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims; num_sink sinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from magi_attention.testing.tolerance import assert_as_exact_as


@dataclass(frozen=True)
class AttnResult:
    """What attention gives, and its gradients; None where it was not asked for.

    ``out`` ``[num_q, hq, dv]``, ``lse`` ``[num_q, hq]``, ``max_logits`` ``[hq]``; ``dq``, ``dk``, ``dv``, ``dsink`` shaped as q, k, v
    and sink.
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    max_logits: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dsink: Tensor | None = None


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> AttnResult:
    """Attention over ``attended`` ``[num_q, num_k]`` bool, every step in ``dtype``.

    float64 is the oracle; the inputs' own dtype is the plain PyTorch run that sets the tolerance. With ``dout`` (of out) or ``dlse`` (of
    lse), also the gradients. Queries that attend nothing give out 0, lse the sinks' (``-inf`` without) and no gradient but the sinks'.
    """
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    sink_leaf = None if sink is None else sink.detach().to(dtype).requires_grad_()
    out, lse, max_logits = _attend(q, k, v, attended, sink_leaf, sink_layout, softmax_scale, softcap)
    given = [(x, grad.to(dtype)) for x, grad in ((out, dout), (lse, dlse)) if grad is not None and x.requires_grad]
    if not given:
        return AttnResult(out.detach(), lse.detach(), max_logits.detach())
    wanted = [q, k, v] if sink_leaf is None else [q, k, v, sink_leaf]
    outputs, output_grads = zip(*given, strict=True)
    grads = torch.autograd.grad(outputs, wanted, output_grads, allow_unused=True)
    filled = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, grads, strict=True)]
    return AttnResult(out.detach(), lse.detach(), max_logits.detach(), *filled)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    sink: Tensor | None,
    sink_layout: str,
    softmax_scale: float | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (num_q, hq, d), (num_k, hk, _) = q.shape, k.shape
    scale = 1 / math.sqrt(d) if softmax_scale is None else softmax_scale
    k, v = k.repeat_interleave(hq // hk, dim=1), v.repeat_interleave(hq // hk, dim=1)
    scaled = torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)) * scale  # [hq, num_q, num_k]
    columns = torch.tanh(scaled / softcap) * softcap if softcap > 0 else scaled
    columns = columns.masked_fill(~attended, -math.inf)
    if sink is not None:
        # [hq, num_q, num_sink]: columns of the softmax that carry no value.
        extra = sink.t().unsqueeze(1).expand(hq, num_q, -1) if sink_layout == "sh" else sink.permute(2, 0, 1)
        columns = torch.cat([columns, extra], dim=-1)
    # A row without columns: softmax is 0/0 there. Give it one column to lean on, and take the row out after.
    empty = (columns == -math.inf).all(dim=-1)  # [hq, num_q]
    leaning = columns.masked_fill(empty.unsqueeze(-1), 0.0)
    probs = torch.softmax(leaning, dim=-1)[..., :num_k].masked_fill(empty.unsqueeze(-1), 0.0)
    out = torch.matmul(probs, v.transpose(0, 1)).transpose(0, 1)
    lse = torch.logsumexp(leaning, dim=-1).masked_fill(empty, -math.inf).t() if columns.shape[-1] else _minus_inf(q)
    max_logits = torch.stack([row[attended].max() if attended.any() else row.new_tensor(-math.inf) for row in scaled])
    return out, lse, max_logits


def _minus_inf(q: Tensor) -> Tensor:
    return q.new_full(q.shape[:2], -math.inf)


def assert_results_as_exact(actual: AttnResult, oracle: AttnResult, plain: AttnResult) -> None:
    """`assert_as_exact_as` for each field that ``actual`` has."""
    assert oracle.lse is not None
    exponent = oracle.lse.abs().masked_fill(oracle.lse.isinf(), 0.0).max().item() if oracle.lse.numel() else 0.0
    for field in fields(AttnResult):
        value, truth, rough = (getattr(result, field.name) for result in (actual, oracle, plain))
        if value is not None:
            is_gradient = field.name.startswith("d")
            assert_as_exact_as(value, truth, rough, field.name, exponent=exponent if is_gradient else 0.0)


def plain_result(q: Tensor, k: Tensor, v: Tensor, attended: Tensor, **options: object) -> AttnResult:
    """The plain PyTorch run for the tolerance: in q's dtype, but lse and max_logits in float32 (float64), as they are kept."""
    low = attention_oracle(q, k, v, attended, dtype=q.dtype, **options)  # type: ignore[arg-type]
    if q.dtype in (torch.float32, torch.float64):
        return low
    forward_options = {name: value for name, value in options.items() if name not in ("dout", "dlse")}
    wide = attention_oracle(q, k, v, attended, dtype=torch.float32, **forward_options)  # type: ignore[arg-type]
    return AttnResult(low.out, wide.lse, wide.max_logits, low.dq, low.dk, low.dv, low.dsink)
