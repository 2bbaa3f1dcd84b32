"""Attention as its formula reads: dense, in the accumulation dtype, on any device. The twin that the other backends are held to.

Its memory grows with ``num_q * num_k``; it is for float64, tests and small inputs. NaN and infinity in a row of q, k, v or dout reach
exactly the queries and keys that attend, or are attended by, that row.

Shapes: i queries, j keys, h query heads, d head dim of q/k, e head dim of v. k and v are repeated to the query heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magi_attention.kernels.attended_products import all_finite, attended_product
from magi_attention.kernels.interface import AttnSettings, KernelMask, Partial
from magi_attention.kernels.partials import finite_lse, merge_
from magi_attention.kernels.precision import accumulation_dtype, without_autocast
from magi_attention.mask.bands import to_dense

name = "reference"


def unsupported(q: Tensor, k: Tensor, v: Tensor, settings: AttnSettings) -> str | None:
    return None


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KernelMask,
    settings: AttnSettings,
    *,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
) -> Partial:
    wide = accumulation_dtype(q.dtype)
    q, k, v = q.to(wide), _repeat_heads(k, q).to(wide), _repeat_heads(v, q).to(wide)
    attended = _attended(mask, q.device)
    q, k, v = _without_idle(q, attended.any(1)), *(_without_idle(x, attended.any(0)) for x in (k, v))
    scaled = settings.softmax_scale * torch.einsum("ihd,jhd->hij", q, k)
    logits = _cap(scaled, settings.softcap).masked_fill(~attended, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)  # [h, i]
    probs = torch.exp(logits - finite_lse(lse).unsqueeze(-1))
    out = _sum_attended(probs, v, None if all_finite(v) else ~attended)
    max_logits = None
    if settings.return_max_logits:
        nothing = scaled.new_full((len(scaled), 1), -math.inf)
        max_logits = torch.cat([scaled.masked_fill(~attended, -math.inf).flatten(1), nothing], dim=1).amax(dim=1)
    partial = Partial(out, lse.transpose(0, 1).contiguous(), max_logits)
    return merge_(into, partial) if into is not None else partial._replace(out=out.to(out_dtype or wide))


@without_autocast
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: KernelMask,
    settings: AttnSettings,
    *,
    dq: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(q.dtype)
    grad_dtype = grad_dtype or wide
    num_heads_kv = k.shape[1]
    q, k, v, dout = q.to(wide), _repeat_heads(k, q).to(wide), _repeat_heads(v, q).to(wide), dout.to(wide)
    attended = _attended(mask, q.device)
    q, dout, delta = (_without_idle(x, attended.any(1)) for x in (q, dout, delta))
    k, v = (_without_idle(x, attended.any(0)) for x in (k, v))
    # Where something is not finite, cells outside the mask are set to 0 once more: 0 * NaN is NaN.
    outside = None if all_finite(q, k, v, dout, delta, finite_lse(lse)) else ~attended
    capped = _cap(settings.softmax_scale * torch.einsum("ihd,jhd->hij", q, k), settings.softcap)
    logits = capped.masked_fill(~attended, -math.inf)
    lse_h, delta_h = lse.transpose(0, 1).unsqueeze(-1), delta.transpose(0, 1).unsqueeze(-1)  # [h, i, 1]
    # No logit is above the lse, except by the rounding of both, which is large where they are.
    probs = torch.exp((logits - finite_lse(lse_h)).clamp_(max=0.0)).masked_fill_(lse_h == -math.inf, 0.0)
    dlogits = probs * (torch.einsum("ihe,jhe->hij", dout, v) - delta_h)
    if settings.softcap > 0:
        dlogits = dlogits * (1 - (capped / settings.softcap) ** 2)  # d tanh = 1 - tanh^2
    dscaled = settings.softmax_scale * dlogits
    if outside is not None:
        probs, dscaled = (x.masked_fill(outside, 0.0) for x in (probs, dscaled))
    outside_by_key = None if outside is None else outside.T
    new_dq = _sum_attended(dscaled, k, outside)
    dk = _sum_heads(_sum_attended(dscaled.transpose(1, 2), q, outside_by_key), num_heads_kv).to(grad_dtype)
    dv = _sum_heads(_sum_attended(probs.transpose(1, 2), dout, outside_by_key), num_heads_kv).to(grad_dtype)
    return (new_dq.to(grad_dtype) if dq is None else dq.add_(new_dq)), dk, dv


def _attended(mask: KernelMask, device: torch.device) -> Tensor:
    """``[num_q, num_k]`` bool."""
    return torch.from_numpy(to_dense(mask.bands, mask.num_q, mask.num_k) > 0).to(device)


def _without_idle(x: Tensor, is_busy: Tensor) -> Tensor:
    """Rows of padding may hold NaN, and 0 * NaN is NaN: rows that attend nothing, or that nothing attends, are 0 here."""
    return x.masked_fill(~is_busy.view(-1, *[1] * (x.dim() - 1)), 0.0)


def _sum_attended(weights: Tensor, rows: Tensor, outside: Tensor | None) -> Tensor:
    """``[h, m, n]``, ``[n, h, e]`` to ``[m, h, e]``. ``outside``, ``[m, n]``, where rows may not be finite."""
    if outside is None:
        return torch.einsum("hmn,nhe->mhe", weights, rows)
    return attended_product(weights, rows.transpose(0, 1), outside).transpose(0, 1)


def _cap(scaled: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scaled / softcap) if softcap > 0 else scaled


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Head ``h`` of q attends head ``h // (hq / hk)`` of k and v."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _sum_heads(grad: Tensor, num_heads_kv: int) -> Tensor:
    return grad.unflatten(1, (num_heads_kv, -1)).sum(dim=2)
