"""Packed documents, as programs tell of them: ids, positions that restart, padding, ``cu_seqlens``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask.bands import CAUSAL, FULL, K0, Q0, Q1, Ints, bands_from_slices, expand
from magi_attention.mask.builders import make_mask, varlen
from magi_attention.mask.combine import attends_same
from magi_attention.mask.inputs import as_array, as_ints
from magi_attention.mask.simplify import merge_bands

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

# `to_cu_seqlens` writes every query of every row out; a mask of documents has one row a query or two.
_MOST_ROWS_PER_QUERY = 64


def from_document_ids(document_ids: Any, *, causal: bool = True, padding_id: int | None = None) -> AttnMask:
    """Tokens attend those of the same id. One row for each two runs of one id; a document in one piece is one row.

    Args:
        document_ids: ``[num_tokens]`` (or ``[1, num_tokens]``) ints. An id may come back further on: it is the same document.
        causal: only earlier tokens and itself.
        padding_id: tokens of this id attend nothing and are attended by nothing; None: there are none.
    """
    ids = as_ints(document_ids, "document_ids")
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
    ends = np.append(starts[1:], len(ids))[: len(starts)]
    run_id = ids[starts]
    if padding_id is not None:
        kept = run_id != padding_id
        starts, ends, run_id = starts[kept], ends[kept], run_id[kept]
    order = np.argsort(run_id, kind="stable")
    first = np.searchsorted(run_id[order], run_id[order], side="left")
    last = np.searchsorted(run_id[order], run_id[order], side="right")
    if causal:
        last = np.arange(1, len(order) + 1)
    q_run, at = expand(first, last - first)
    q_run, k_run = order[q_run], order[at]
    ranges = np.stack([starts, ends], axis=1)
    types = np.where(causal & (q_run == k_run), CAUSAL, FULL)
    bands = bands_from_slices(ranges[q_run], ranges[k_run], types)
    return make_mask(bands[np.lexsort((bands[:, K0], bands[:, Q0]))], len(ids), len(ids))


def from_position_ids(position_ids: Any, *, causal: bool = True) -> AttnMask:
    """Packed documents whose positions count 0, 1, 2, ... and begin again at 0 with each document. One row a document.

    Args:
        position_ids: ``[num_tokens]`` (or ``[1, num_tokens]``) ints.

    Raises:
        ValueError: a position that neither continues nor restarts at 0, from which no document can be told.
    """
    positions = as_ints(position_ids, "position_ids")
    starts = np.flatnonzero(positions == 0)
    expected = (
        np.arange(len(positions)) - starts[np.cumsum(positions == 0) - 1] if len(starts) else np.arange(len(positions))
    )
    wrong = np.flatnonzero(positions != expected)
    if len(positions) and (not len(starts) or starts[0] != 0):
        wrong = np.array([0])
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"position_ids must count up by one from 0 and begin again at 0 with each document, but position_ids[{at}] is "
            f"{int(positions[at])}"
            + (f" behind {int(positions[at - 1])}" if at else "")
            + "; for documents of which only "
            "parts are here, use from_document_ids"
        )
    return varlen(np.append(starts, len(positions)), causal=causal)


def from_attention_mask(attention_mask: Any, *, causal: bool = True) -> AttnMask:
    """A batch as tokenizers pad it, laid end to end: ``[batch, seq]`` becomes ``batch * seq`` tokens.

    Tokens attend those of their own sequence that are not padding; padding attends nothing. One row a run of real tokens, and one
    more for each two runs of one sequence.

    Args:
        attention_mask: ``[batch, seq]`` or ``[seq]`` of 1 (or True) for tokens, 0 for padding, on either side or between.

    Raises:
        ValueError: other values, or another number of axes.
    """
    array = as_array(attention_mask, "attention_mask")
    if array.ndim not in (1, 2) or not np.isin(array, (0, 1)).all():
        raise ValueError(
            "attention_mask must be [batch, seq] or [seq] of 0 (padding) and 1 (tokens), got shape "
            f"{list(array.shape)} with values {np.unique(array)[:6].tolist()}; for ids of documents, use from_document_ids; "
            "for a matrix of queries and keys, from_dense"
        )
    array = array.reshape(1, -1) if array.ndim == 1 else array
    ids = np.where(array.astype(bool), np.arange(array.shape[0])[:, None], -1).ravel()
    return from_document_ids(ids, causal=causal, padding_id=-1)


def to_cu_seqlens(mask: AttnMask) -> tuple[Ints, Ints, bool]:
    """``(cu_seqlens_q, cu_seqlens_k, causal)`` int64, for functions that take packed documents.

    Where documents are both (of one query, or one token), ``causal`` is False. Queries or keys between documents become documents
    without keys or queries. ``varlen(cu_seqlens_q, cu_seqlens_k, causal=causal)`` attends the same cells: that is checked.

    Raises:
        ValueError: no packed documents, all full or all causal, attend these cells.
    """
    left, right, seen = _by_query(mask)
    attending = np.flatnonzero(seen)
    if not len(attending):
        return np.array([0, mask.num_q, mask.num_q]), np.array([0, 0, mask.num_k]), False
    if (right - left != seen)[attending].any():
        query = int(attending[np.argmax((right - left != seen)[attending])])
        raise ValueError(
            f"cu_seqlens cannot tell of this mask: query {query} attends {int(seen[query])} keys among [{int(left[query])}, "
            f"{int(right[query])}), which are not one range. Use its slices (`to_slices`)"
        )
    edges_q, edges_k = _edges(attending, left, right, mask)
    monotone = (np.diff(edges_q) >= 0).all() and (np.diff(edges_k) >= 0).all()
    for causal in (False, True):
        if monotone and attends_same(mask, varlen(edges_q, edges_k, causal=causal)):
            return edges_q, edges_k, causal
    raise ValueError(
        "cu_seqlens cannot tell of this mask: its documents are not all full or all causal, or they share keys. Use its slices "
        "(`to_slices`)"
    )


def _by_query(mask: AttnMask) -> tuple[Ints, Ints, Ints]:
    """``[num_q]`` each: the first key that a query attends, the end of the last, and how many it attends."""
    bands = mask.bands
    if int((bands[:, Q1] - bands[:, Q0]).sum()) > _MOST_ROWS_PER_QUERY * mask.num_q:
        bands = merge_bands(bands)
    if int((bands[:, Q1] - bands[:, Q0]).sum()) > _MOST_ROWS_PER_QUERY * mask.num_q:
        raise ValueError(
            "cu_seqlens cannot tell of this mask: its queries attend keys in too many pieces. Use its slices (`to_slices`)"
        )
    row, query = expand(bands[:, Q0], bands[:, Q1] - bands[:, Q0])
    k0, k1, lo, hi = bands[row, K0:].T
    begin, end = np.maximum(k0, query + lo), np.minimum(k1, query + hi + 1)
    left, right, seen = np.full(mask.num_q, mask.num_k), np.zeros(mask.num_q, np.int64), np.zeros(mask.num_q, np.int64)
    np.minimum.at(left, query, begin)
    np.maximum.at(right, query, end)
    np.add.at(seen, query, end - begin)
    return left, right, seen


def _edges(attending: Ints, left: Ints, right: Ints, mask: AttnMask) -> tuple[Ints, Ints]:
    """Documents as the queries' first keys tell of them, if they are of that kind, and what lies between documents as documents."""
    first, last = left[attending], right[attending]
    opens = (np.diff(first, prepend=-1) != 0) | (np.diff(attending, prepend=-2) != 1)
    begin = attending[opens]
    closes = np.append(np.flatnonzero(opens)[1:], len(attending)) - 1
    end = attending[closes] + 1
    k_begin, k_end = first[opens], last[closes]
    # Document, then queries without keys, then keys without queries, each perhaps of none.
    next_q, next_k = np.append(begin[1:], mask.num_q), np.append(k_begin[1:], mask.num_k)
    edges_q = np.concatenate([[0, begin[0], begin[0]], np.stack([end, next_q, next_q], axis=1).ravel()])
    edges_k = np.concatenate([[0, 0, k_begin[0]], np.stack([k_end, k_end, next_k], axis=1).ravel()])
    return _without_empty(edges_q, edges_k)


def _without_empty(edges_q: Ints, edges_k: Ints) -> tuple[Ints, Ints]:
    kept = np.append(True, (np.diff(edges_q) != 0) | (np.diff(edges_k) != 0))
    return edges_q[kept], edges_k[kept]
