"""Sinks: logits that join the softmax's denominator and nothing else.

A sink has no value, so it only enlarges the lse and shrinks the output by as much: no kernel knows of them. These functions are
plain tensor arithmetic without autograd, for one device and for many.

Shapes: num_q tokens; hq query heads; dv head dim of v; num_sink sinks. Layouts: "sh" ``[num_sink, hq]``, the same for every query;
"ssh" ``[num_q, num_sink, hq]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_attention.kernels.partials import finite_lse

SINK_LAYOUTS = ("sh", "ssh")


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor, layout: str = "sh") -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with the sinks in the denominator, both in lse's dtype.

    ``out``: ``[num_q, hq, dv]``, ``lse``: ``[num_q, hq]``, of attention over all keys without sinks. With
    ``l' = log(exp(l) + sum exp(sink))``, the output is ``out * exp(l - l')``. A query that attends nothing keeps output 0, and its
    lse is the sinks'.
    """
    with_sink = torch.logaddexp(lse, torch.logsumexp(sink.to(lse.dtype), dim=_sink_dim(layout)))
    return out * torch.exp(lse - finite_lse(with_sink)).unsqueeze(-1), with_sink


def sink_gradient(lse: Tensor, sink: Tensor, delta: Tensor, layout: str = "sh") -> Tensor:
    """Gradient of ``sink``, in its shape and lse's dtype.

    ``lse``: ``[num_q, hq]`` with the sinks in it; ``delta``: ``[num_q, hq]``, ``sum(out * dout, -1) - dlse``. A sink's probability is
    ``exp(sink - lse)`` and its value is 0, so its gradient is ``-exp(sink - lse) * delta``, summed over the queries that share it. Where a
    query attends nothing, its lse is the sinks', and dlse alone counts.
    """
    sink, lse = sink.to(lse.dtype), finite_lse(lse)
    if _sink_dim(layout) == 1:
        return -torch.exp(sink - lse.unsqueeze(1)) * delta.unsqueeze(1)
    # One sink at a time: [num_q, hq] at once, whatever their number.
    shares = [-(torch.exp(row - lse) * delta).sum(dim=0) for row in sink]
    return torch.stack(shares) if shares else torch.zeros_like(sink)


def _sink_dim(layout: str) -> int:
    """The axis over which sinks are numbered."""
    return SINK_LAYOUTS.index(layout)
