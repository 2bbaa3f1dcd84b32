"""Helpers around the keys: padding, and masks from cumulative lengths and windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from magi_attention.common import AttnRange, AttnRanges
from magi_attention.common.enum import AttnMaskType, to_mask_types
from magi_attention.mask.bands import Ints
from magi_attention.mask.inputs import as_cu_seqlens, check_size, ranges_of
from magi_attention.mask.window import check_window, window_slices
from magi_attention.plan.layout import padded_length

_MASK_TYPES = tuple(AttnMaskType.from_int_type(kind) for kind in range(4))


def compute_pad_size(total_seqlen_q: int, cp_size: int, chunk_size: int) -> int:
    """Rows of padding that make ``total_seqlen_q`` whole chunks, equally many on each of ``cp_size`` ranks.

    Raises:
        ValueError: a negative length, or a size below 1.
    """
    if total_seqlen_q < 0 or cp_size < 1 or chunk_size < 1:
        raise ValueError(
            "total_seqlen_q must be at least 0, and cp_size and chunk_size at least 1, got "
            f"total_seqlen_q={total_seqlen_q}, cp_size={cp_size}, chunk_size={chunk_size}"
        )
    return padded_length(total_seqlen_q, cp_size, chunk_size) - total_seqlen_q


def pad_at_dim(x: Tensor, dim: int, pad_size: int, value: float = 0.0, side: str = "right") -> Tensor:
    """``x`` with ``pad_size`` entries of ``value`` behind (``side="right"``) or before ("left") axis ``dim``, which may be negative.

    Raises:
        ValueError: no such axis, a negative size, or another side.
    """
    dim = _check_dim(x, dim)
    if pad_size < 0:
        raise ValueError(f"pad_size must be at least 0, got {pad_size}; unpad_at_dim takes entries away")
    if side not in ("left", "right"):
        raise ValueError(f'side must be "left" or "right", got {side!r}')
    pad = [0] * (2 * (x.dim() - dim))
    pad[-2 if side == "left" else -1] = pad_size
    return F.pad(x, pad, mode="constant", value=value)


def unpad_at_dim(x: Tensor, dim: int, pad_size: int) -> Tensor:
    """``x`` without the last ``pad_size`` entries of axis ``dim``, which may be negative; a view.

    Raises:
        ValueError: no such axis, or it has fewer entries.
    """
    dim = _check_dim(x, dim)
    if not 0 <= pad_size <= x.shape[dim]:
        raise ValueError(f"pad_size must be in [0, {x.shape[dim]}], the length of axis {dim}, got {pad_size}")
    return x.narrow(dim, 0, x.shape[dim] - pad_size)


def _check_dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x, in [{-x.dim()}, {x.dim()}), got {dim}")
    return dim % x.dim()


def squash_batch_dim(x: Tensor) -> Tensor:
    """``[batch, seq, ...]`` as packed tokens ``[batch * seq, ...]``.

    Raises:
        ValueError: fewer than two axes.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be [batch, seq, ...], got shape {list(x.shape)}")
    return x.flatten(0, 1)


def apply_padding(
    q_ranges: AttnRanges | Iterable[Any],
    k_ranges: AttnRanges | Iterable[Any],
    attn_mask_type: str | AttnMaskType | Sequence[str | AttnMaskType],
    total_seqlen: int,
    pad_size: int,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """The slices, and one more for ``pad_size`` query rows behind ``total_seqlen`` that attend nothing.

    Args:
        q_ranges, k_ranges: one of each a slice (`AttnRanges`, or lists of pairs); left as they are.
        attn_mask_type: one type for all slices, or one each.
        total_seqlen: tokens of q, unpadded.
        pad_size: rows of padding.

    Returns:
        ``(q_ranges, k_ranges, mask_types)``, new, each longer by one: ``[total_seqlen, total_seqlen + pad_size)``, ``[0, 0)``, FULL.

    Raises:
        ValueError: a negative size, lists of unequal length, or a q_range that reaches into the padding.
    """
    padded_q, padded_k = AttnRanges.from_ranges(q_ranges, check=True), AttnRanges.from_ranges(k_ranges, check=True)
    if len(padded_q) != len(padded_k):
        raise ValueError(f"a mask needs one q_range and one k_range a slice, got {len(padded_q)} and {len(padded_k)}")
    if pad_size < 0:
        raise ValueError(f"pad_size must be at least 0, got {pad_size}")
    if not padded_q.is_empty() and padded_q.end > total_seqlen:
        raise ValueError(
            f"q_ranges must end within total_seqlen={total_seqlen}, where the padding begins, got one that ends at {padded_q.end}"
        )
    types = to_mask_types(attn_mask_type, len(padded_q))
    padded_q.append(AttnRange(total_seqlen, total_seqlen + pad_size))
    padded_k.append(AttnRange(0, 0))
    return padded_q, padded_k, [*types, AttnMaskType.FULL]


def infer_varlen_mask_from_batch(
    batch_size: int, seq_len: int, device: str | int | torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """``(cu_seqlens_q, cu_seqlens_k)`` of a batch of equal lengths: ``[batch_size + 1]`` int32 each.

    ``device`` omitted is the current GPU, or the CPU where there is none.

    Raises:
        ValueError: a negative size, or more tokens than int32 counts.
    """
    total = batch_size * seq_len
    if batch_size < 0 or seq_len < 0 or total > torch.iinfo(torch.int32).max:
        raise ValueError(
            "batch_size and seq_len must be at least 0, and their product fit in int32, got "
            f"batch_size={batch_size}, seq_len={seq_len}"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
    return cu_seqlens, cu_seqlens.clone()


def infer_attn_mask_from_sliding_window(
    q_range: AttnRange | Sequence[int], k_range: AttnRange | Sequence[int], window_size: Sequence[int]
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    """The fewest slices of one sample under a window: at most three.

    Args:
        q_range, k_range: the tokens of the sample.
        window_size: ``(left, right)``, flash-attention's, bottom-right aligned: query ``i`` of ``sq`` sees keys
            ``i + sk - sq - left .. i + sk - sq + right`` of ``sk``; -1 is unbounded. Where ``sq > sk`` the first ``sq - sk`` queries see
            nothing, whatever the window.

    Returns:
        ``(q_ranges, k_ranges, mask_types)``, in the order of queries.

    Raises:
        ValueError: a range or a window that is none.
    """
    q, k = (np.array([AttnRange.from_range(r).to_naive_range()], np.int64) for r in (q_range, k_range))
    return _as_public(*window_slices(q, k, check_window(window_size)))


def infer_attn_mask_from_cu_seqlens(
    cu_seqlens_q: Sequence[int] | Tensor,
    cu_seqlens_k: Sequence[int] | Tensor,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    global_window_size: int = 0,
) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType], int, int]:
    """The fewest slices of packed samples.

    Args:
        cu_seqlens_q, cu_seqlens_k: ``[num_samples + 1]`` cumulative lengths in tokens, from 0.
        causal: every sample is causal, bottom-right aligned; not together with a window.
        window_size: ``(left, right)`` as in `infer_attn_mask_from_sliding_window`; ``(-1, -1)`` is one FULL (or CAUSAL) slice a sample.
        global_window_size: the first keys of a sample that all its queries also see, as far as ``right`` allows:
            ``j < min(global_window_size, i + sk - sq + right + 1)``.

    Returns:
        ``(q_ranges, k_ranges, mask_types, total_seqlen_q, total_seqlen_k)``, slices ordered by sample and disjoint in cells.

    Raises:
        ValueError: cumulative lengths that do not start at 0, that descend, or that are not equally many; a window that is none; both
            causal and a window.
    """
    window = check_window(window_size)
    if causal and window != (-1, -1):
        raise ValueError(
            f"causal=True and window_size={window} exclude each other; a causal window is causal=False with window_size=(left, 0)"
        )
    num_global = check_size(global_window_size, "global_window_size")
    edges_q, edges_k = (
        as_cu_seqlens(edges, name, is_batch_of_one=False)
        for edges, name in ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_k, "cu_seqlens_k"))
    )
    q_pairs, k_pairs = ranges_of(edges_q), ranges_of(edges_k)
    if len(q_pairs) != len(k_pairs):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of equally many samples, got {len(q_pairs)} and {len(k_pairs)}"
        )
    if window == (-1, -1):
        kind = AttnMaskType.CAUSAL if causal else AttnMaskType.FULL
        slices = _as_public(q_pairs, k_pairs, np.full(len(q_pairs), kind.to_int_type()))
    else:
        slices = _as_public(*window_slices(q_pairs, k_pairs, window, num_global))
    return *slices, int(edges_q[-1]), int(edges_k[-1])


def _as_public(q_ranges: Ints, k_ranges: Ints, types: Ints) -> tuple[AttnRanges, AttnRanges, list[AttnMaskType]]:
    return (
        AttnRanges.from_ranges(q_ranges.tolist()),
        AttnRanges.from_ranges(k_ranges.tolist()),
        [_MASK_TYPES[kind] for kind in types.tolist()],
    )
