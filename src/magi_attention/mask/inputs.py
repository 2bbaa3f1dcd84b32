"""What users give as sequences of ints (lists, arrays, tensors of any device), checked and as int64 arrays."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

from magi_attention.mask.bands import Ints


def as_array(values: Any, name: str) -> np.ndarray[Any, Any]:
    """A list, array or tensor (of any device) as an array.

    Raises:
        ValueError: rows of different lengths.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be rectangular: every row as long as the others ({error})") from error


def as_ints(values: Any, name: str) -> Ints:
    """``[n]`` int64. Leading axes of size 1 are dropped: programs hold packed batches as a batch of one.

    Raises:
        ValueError: not one axis of whole numbers.
    """
    array = as_array(values, name)
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be one axis of ints, got shape {list(array.shape)} of {array.dtype}")
    return array.astype(np.int64)


def as_pairs(values: Any, name: str) -> Ints:
    """``[n, 2]`` int64.

    Raises:
        ValueError: not pairs of whole numbers.
    """
    array = as_array(values, name)
    if array.size and (array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} must be pairs of ints (start, end), shape [n, 2], got shape {list(array.shape)} of {array.dtype}"
        )
    return array.astype(np.int64).reshape(-1, 2)


def as_cu_seqlens(values: Any, name: str) -> Ints:
    """``[num_documents + 1]`` int64: where packed documents begin, and the end.

    Raises:
        ValueError: does not begin at 0, or descends.
    """
    edges = as_ints(values, name)
    if not len(edges) or edges[0] != 0 or (np.diff(edges) < 0).any():
        raise ValueError(
            f"{name} must begin at 0 and never descend, one entry more than there are documents, got {edges.tolist()[:12]}"
        )
    return edges


def as_lengths(values: Any, name: str) -> Ints:
    """``[n]`` int64, none negative.

    Raises:
        ValueError: one is.
    """
    lengths = as_ints(values, name)
    if (lengths < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(lengths.min())}")
    return lengths


def check_length(value: int, name: str, least: int = 0) -> int:
    """A number of tokens or blocks.

    Raises:
        ValueError: below ``least``.
    """
    try:
        length = least - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        length = least - 1
    if length < least:
        raise ValueError(f"{name} must be an int of {least} or more, got {value!r}")
    return length


def ranges_of(edges: Ints) -> Ints:
    """``[n, 2]`` ranges between the ``n + 1`` edges."""
    return np.stack([edges[:-1], edges[1:]], axis=1)
