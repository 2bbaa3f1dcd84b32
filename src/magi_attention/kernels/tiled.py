"""Attention over tiles in plain torch: for any device, without a compiler, and never with an array of ``num_q * num_k``.

The mask's bands are cut into pieces of at most a tile; a piece is a rectangle that is tight around its cells, so cells outside the mask
cost at most the triangles of edge pieces, and a piece without such a corner needs no mask. Queries go tile by tile, with the online
softmax of Milakov and Gimelshein (2018) forward and the recomputed probabilities of FlashAttention (Dao et al., 2022) backward.

Low-precision tiles are widened before they are multiplied: torch's CPU products of bfloat16 round their results to it.

NaN and infinity in a row of q, k, v or dout reach exactly the queries and keys that attend, or are
attended by, that row. Inputs are looked at once a call, which waits for a GPU; where one is not
finite, products are made by `attended_product`. During CUDA graph capture nobody can look: inputs
are taken for finite, and NaN may then reach other rows of a tile.

Shapes: num_q, num_k tokens; hq = hk * g heads; d, dv head dims. Inside a tile of r queries the g query heads that share a key head
are rows of one matrix, ``[hk, r * g, ...]`` with row ``i * g + head``: k and v are read once for all of them, and never repeated.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from magi_attention.kernels.attended_products import all_finite, attended_product
from magi_attention.kernels.interface import AttnSettings, KernelMask, Partial
from magi_attention.kernels.partials import empty_partial, finite_lse, merge_
from magi_attention.kernels.precision import accumulation_dtype, without_autocast
from magi_attention.mask.bands import K0, K1, Q0, expand, split_q, tighten

name = "tiled"

_TILE_K = 512
_MAX_TILE_Q = 256
_MIN_TILE_Q = 16
# Logits held at once, over all heads: large enough for products to run at speed, small enough for a cache.
_MAX_LOGITS = 1 << 20


@dataclass(frozen=True)
class _Piece:
    """Queries ``[start, end)`` of a tile against keys ``[k0, k1)``.

    With ``x`` counting queries from ``start`` and ``y`` keys from ``k0``, cells with ``lo <= y - x <= hi`` are attended; a side that binds
    nowhere is None.
    """

    start: int
    end: int
    k0: int
    k1: int
    lo: int | None
    hi: int | None


@dataclass(frozen=True)
class _Tile:
    """Queries ``[q0, q1)`` and all the pieces that they attend."""

    q0: int
    q1: int
    pieces: list[_Piece]


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
    hq, hk, wide = q.shape[1], k.shape[1], accumulation_dtype(q.dtype)
    partial = into
    if partial is None:
        partial = empty_partial(q, v.shape[2], out_dtype, with_max_logits=settings.return_max_logits)
    top = torch.full((hk, hq // hk), -math.inf, dtype=wide, device=q.device)
    is_finite = all_finite(v)
    for tile in _cut(mask, hq):
        q_rows = _rows(q[tile.q0 : tile.q1], hk, wide) * settings.softmax_scale
        out, lse, tile_top = _attend(q_rows, k, v, tile, settings, is_finite)
        torch.maximum(top, tile_top, out=top)
        rows = Partial(partial.out[tile.q0 : tile.q1], partial.lse[tile.q0 : tile.q1], None)
        if into is None:
            rows.out.copy_(_unrows(out, hq))
            rows.lse.copy_(_unrows(lse, hq))
        else:
            merge_(rows, Partial(_unrows(out, hq), _unrows(lse, hq), None))
    if partial.max_logits is not None:
        torch.maximum(partial.max_logits, top.flatten(), out=partial.max_logits)
    return partial


def _attend(
    q_rows: Tensor, k: Tensor, v: Tensor, tile: _Tile, settings: AttnSettings, is_finite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile of scaled queries ``[hk, r * g, d]``: ``(out [hk, r * g, dv], lse [hk, r * g], largest logit [hk, g])``.

    ``is_finite``: all of v is.
    """
    hk, num_rows, _ = q_rows.shape
    group = num_rows // (tile.q1 - tile.q0)
    row_max = q_rows.new_full((hk, num_rows), -math.inf)
    row_sum = q_rows.new_zeros(hk, num_rows)
    top = row_max.clone() if settings.softcap > 0 else row_max  # before softcap
    out = q_rows.new_zeros(hk, num_rows, v.shape[2])
    for piece in tile.pieces:
        rows, keys = slice(piece.start * group, piece.end * group), slice(piece.k0, piece.k1)
        outside = _outside(piece, q_rows.device)
        logits = torch.bmm(q_rows[:, rows], _heads(k[keys], q_rows.dtype).transpose(1, 2))  # [hk, r * g, keys]
        _fill(logits, outside, group)
        if settings.softcap > 0:
            torch.maximum(top[:, rows], logits.amax(dim=-1), out=top[:, rows])
            logits.div_(settings.softcap).tanh_().mul_(settings.softcap)
            _fill(logits, outside, group)
        # Every query of a piece attends some key of it, so the new maximum is finite.
        new_max = torch.maximum(row_max[:, rows], logits.amax(dim=-1))
        shrink = torch.exp(row_max[:, rows] - new_max)
        row_max[:, rows] = new_max
        probs = logits.sub_(new_max.unsqueeze(-1)).exp_()
        row_sum[:, rows] = row_sum[:, rows].mul_(shrink).add_(probs.sum(dim=-1))
        sums, values = out[:, rows].mul_(shrink.unsqueeze(-1)), _heads(v[keys], q_rows.dtype)
        if is_finite:
            out[:, rows] = torch.baddbmm(sums, probs, values)
        else:
            out[:, rows] = sums + attended_product(probs, values, _outside_rows(outside, group))
    lse = row_max + torch.log(row_sum)
    out.div_(row_sum.masked_fill(row_sum == 0, 1.0).unsqueeze(-1))
    return out, lse, top.unflatten(1, (-1, group)).amax(dim=1)


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
    hq, hk, wide = q.shape[1], k.shape[1], accumulation_dtype(q.dtype)
    grad_dtype = grad_dtype or wide
    new_dq = torch.zeros(q.shape, dtype=grad_dtype, device=q.device) if dq is None else dq
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    is_finite = all_finite(q, k, v, dout, delta, finite_lse(lse))
    # exp(s - inf) = 0: rows that attend nothing get no probability.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    for tile in _cut(mask, hq):
        queries = slice(tile.q0, tile.q1)
        q_rows = _rows(q[queries], hk, wide) * settings.softmax_scale
        statistics = _rows(lse[queries].unsqueeze(-1), hk, wide), _rows(delta[queries].unsqueeze(-1), hk, wide)
        dq_rows = _add_gradients(
            q_rows, k, v, _rows(dout[queries], hk, wide), *statistics, tile, settings, is_finite, dk, dv
        )
        new_dq[queries] += _unrows(dq_rows.mul_(settings.softmax_scale), hq)
    return new_dq, dk.to(grad_dtype), dv.to(grad_dtype)


def _add_gradients(
    q_rows: Tensor,
    k: Tensor,
    v: Tensor,
    dout_rows: Tensor,
    lse: Tensor,
    delta: Tensor,
    tile: _Tile,
    settings: AttnSettings,
    is_finite: bool,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Add one tile's part to ``dk``, ``dv``; returns the gradient of the scaled queries ``[hk, r * g, d]``.

    ``q_rows``, ``dout_rows``, ``lse``, ``delta``: ``[hk, r * g, d | dv | 1 | 1]``. ``is_finite``: all inputs are.
    """
    wide, group = q_rows.dtype, q_rows.shape[1] // (tile.q1 - tile.q0)
    dq_rows = torch.zeros_like(q_rows)
    for piece in tile.pieces:
        rows, keys = slice(piece.start * group, piece.end * group), slice(piece.k0, piece.k1)
        k_piece, v_piece = _heads(k[keys], wide), _heads(v[keys], wide)
        q_piece, dout_piece = q_rows[:, rows], dout_rows[:, rows]
        logits = torch.bmm(q_piece, k_piece.transpose(1, 2))  # [hk, r * g, keys]
        slope = None
        if settings.softcap > 0:
            capped = logits.div_(settings.softcap).tanh_()
            slope = 1 - capped.square()
            logits = capped.mul_(settings.softcap)
        outside = _outside(piece, q_rows.device)
        _fill(logits, outside, group)
        # No logit is above the lse, except by the rounding of both, which is large where they are.
        probs = logits.sub_(lse[:, rows]).clamp_(max=0.0).exp_()
        dlogits = torch.bmm(dout_piece, v_piece.transpose(1, 2)).sub_(delta[:, rows]).mul_(probs)
        if slope is not None:
            dlogits.mul_(slope)
        product, product_by_key = torch.bmm, torch.bmm
        if not is_finite:  # then cells outside the mask are set to 0 once more: 0 * NaN is NaN
            _fill(probs, outside, group, 0.0)
            _fill(dlogits, outside, group, 0.0)
            rows_outside = _outside_rows(outside, group)
            product = functools.partial(attended_product, outside=rows_outside)
            product_by_key = functools.partial(
                attended_product, outside=None if rows_outside is None else rows_outside.T
            )
        _heads(dv[keys], wide).add_(product_by_key(probs.transpose(1, 2), dout_piece))
        dq_rows[:, rows] += product(dlogits, k_piece)
        _heads(dk[keys], wide).add_(product_by_key(dlogits.transpose(1, 2), q_piece))
    return dq_rows


def _rows(x: Tensor, num_heads_kv: int, dtype: torch.dtype) -> Tensor:
    """``[r, hk * g, n]`` to ``[hk, r * g, n]``."""
    return x.to(dtype).unflatten(1, (num_heads_kv, -1)).transpose(0, 1).flatten(1, 2)


def _unrows(x: Tensor, num_heads_q: int) -> Tensor:
    """``[hk, r * g, ...]`` to ``[r, hk * g, ...]``."""
    group = num_heads_q // x.shape[0]
    return x.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[keys, hk, n]`` as ``[hk, keys, n]``: a view where x has that dtype."""
    return x.to(dtype).transpose(0, 1)


def _outside(piece: _Piece, device: torch.device) -> Tensor | None:
    """``[r, keys]`` bool: the piece's cells that are not attended; None where all are."""
    if piece.lo is None and piece.hi is None:
        return None
    num_rows, num_keys = piece.end - piece.start, piece.k1 - piece.k0
    outside = torch.zeros(num_rows, num_keys, dtype=torch.bool, device=device)
    diagonal = torch.arange(num_keys, device=device) - torch.arange(num_rows, device=device).unsqueeze(1)
    if piece.lo is not None:
        outside |= diagonal < piece.lo
    if piece.hi is not None:
        outside |= diagonal > piece.hi
    return outside


def _outside_rows(outside: Tensor | None, group: int) -> Tensor | None:
    """``[r, keys]`` to ``[r * g, keys]``."""
    return None if outside is None else outside.repeat_interleave(group, dim=0)


def _fill(cells: Tensor, outside: Tensor | None, group: int, value: float = -math.inf) -> None:
    """``cells``: ``[hk, r * g, keys]``; ``outside``: ``[r, keys]``."""
    if outside is not None:
        cells.unflatten(1, (-1, group)).masked_fill_(outside.unsqueeze(1), value)


def _cut(mask: KernelMask, num_heads_q: int) -> list[_Tile]:
    """The mask's work for so many heads, made once a mask."""
    tile_q = min(_MAX_TILE_Q, max(_MIN_TILE_Q, _MAX_LOGITS // (_TILE_K * num_heads_q)))
    key = (name, tile_q, _TILE_K)
    if key not in mask.derived:
        mask.derived[key] = cut_tiles(mask, tile_q, _TILE_K)
    tiles: list[_Tile] = mask.derived[key]
    return tiles


def cut_tiles(mask: KernelMask, tile_q: int, tile_k: int) -> list[_Tile]:
    """Pieces of at most ``tile_q`` queries and ``tile_k`` keys, tight, by tiles of queries, each from its first key on."""
    starts = np.arange(0, mask.num_q, tile_q)
    ends = np.minimum(starts + tile_q, mask.num_q)
    bands, _, tile = split_q(mask.bands, starts, ends)
    row, part = expand(np.zeros(len(bands), np.int64), -(-(bands[:, K1] - bands[:, K0]) // tile_k))
    pieces, tile = bands[row], tile[row]
    pieces[:, K0] += part * tile_k
    pieces[:, K1] = np.minimum(pieces[:, K1], pieces[:, K0] + tile_k)
    pieces, kept = tighten(pieces)
    tile = tile[kept]
    order = np.lexsort((pieces[:, Q0], pieces[:, K0], tile))
    pieces, tile = pieces[order], tile[order]
    q0, q1, k0, k1, lo, hi = pieces.T
    origin = k0 - q0
    columns = (q0 - starts[tile], q1 - starts[tile], k0, k1, lo - origin, hi - origin)
    is_bound = (lo > k0 - q1 + 1, hi < k1 - 1 - q0)
    made = [
        _Piece(start, end, first, last, low if is_low else None, high if is_high else None)
        for start, end, first, last, low, high, is_low, is_high in zip(
            *(x.tolist() for x in columns + is_bound), strict=True
        )
    ]
    cuts = np.flatnonzero(np.diff(tile, prepend=-1)).tolist()
    return [
        _Tile(int(starts[tile[at]]), int(ends[tile[at]]), made[at:stop]) for at, stop in pairwise([*cuts, len(made)])
    ]
