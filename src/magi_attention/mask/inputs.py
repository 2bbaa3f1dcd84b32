"""What users give as sequences of ints (lists, arrays, tensors of any device), checked and as int64 arrays."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

from magi_attention.mask.bands import Ints

# The largest length and bound of a mask: ranges are int32 in every kernel, and up to here no sum, difference or number of cells
# leaves int64.
MOST_TOKENS = (1 << 31) - 1
_INT64 = np.iinfo(np.int64)


def as_array(values: Any, name: str) -> np.ndarray[Any, Any]:
    """A list, array or tensor (of any device) as an array.

    Raises:
        ValueError: rows of different lengths.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
        if array.dtype.kind == "f" and not hasattr(values, "dtype"):
            # numpy makes floats of ints of which some need int64 and others uint64.
            exact = np.asarray(values, dtype=object)
            array = exact if _is_whole(exact) else array
    except ValueError as error:
        raise ValueError(f"{name} must be rectangular: every row as long as the others ({error})") from error
    return array


def as_ints(values: Any, name: str) -> Ints:
    """``[n]`` int64. Leading axes of size 1 are dropped: programs hold packed batches as a batch of one.

    Raises:
        ValueError: not one axis of whole numbers, or a number beyond int64.
    """
    array = as_array(values, name)
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or (array.size and not _is_whole(array)):
        raise ValueError(f"{name} must be one axis of ints, got shape {list(array.shape)} of {array.dtype}")
    return _to_int64(array, name)


def as_pairs(values: Any, name: str) -> Ints:
    """``[n, 2]`` int64.

    Raises:
        ValueError: not pairs of whole numbers, or a number beyond ``MOST_TOKENS``.
    """
    array = as_array(values, name)
    if array.size and (array.ndim != 2 or array.shape[1] != 2 or not _is_whole(array)):
        raise ValueError(
            f"{name} must be pairs of ints (start, end), shape [n, 2], got shape {list(array.shape)} of {array.dtype}"
        )
    pairs = _to_int64(array, name).reshape(-1, 2)
    _check_tokens(pairs, name)
    return pairs


def as_cu_seqlens(values: Any, name: str, is_batch_of_one: bool = True) -> Ints:
    """``[num_documents + 1]`` int64: where packed documents begin, and the end.

    Args:
        is_batch_of_one: leading axes of size 1 are dropped.

    Raises:
        ValueError: does not begin at 0, descends, or ends beyond ``MOST_TOKENS``.
    """
    array = as_array(values, name)
    while is_batch_of_one and array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    # Neighbours are compared, not subtracted: differences of unsigned ints, and of large ones, wrap around.
    if array.ndim != 1 or not array.size or not _is_whole(array) or array[0] != 0 or (array[1:] < array[:-1]).any():
        shown = array.ravel()[:12].tolist() if array.ndim else values
        raise ValueError(
            f"{name} must be cumulative lengths in tokens: one axis of ints that starts at 0 and never descends, one more than there "
            f"are documents; got shape {list(array.shape)} of {array.dtype}: {shown}"
        )
    _check_tokens(array, name)
    return array.astype(np.int64)


def as_lengths(values: Any, name: str) -> Ints:
    """``[n]`` int64, none negative.

    Raises:
        ValueError: one is, or one is beyond ``MOST_TOKENS``.
    """
    lengths = as_ints(values, name)
    if (lengths < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(lengths.min())}")
    _check_tokens(lengths, name)
    return lengths


def check_length(value: int, name: str, least: int = 0) -> int:
    """A number of tokens or blocks.

    Raises:
        ValueError: below ``least``, or beyond ``MOST_TOKENS``.
    """
    length = _as_count(value, name, least)
    if length > MOST_TOKENS:
        raise ValueError(f"{name} must be at most {MOST_TOKENS:,}, which is what int32 ranges reach, got {length:,}")
    return length


def check_size(value: int, name: str, least: int = 0) -> int:
    """A size that only bounds something (a window, a block, a number of blocks): above ``MOST_TOKENS`` all say the same.

    Raises:
        ValueError: below ``least``.
    """
    return min(_as_count(value, name, least), MOST_TOKENS)


def as_bounds(values: Any, name: str) -> Ints:
    """Whole numbers of any shape as int64, for bounds that are cut to a length anyhow: uint64 beyond int64 is its largest.

    Raises:
        ValueError: something else than whole numbers.
    """
    array = as_array(values, name)
    if array.size and not _is_whole(array):
        raise ValueError(f"{name} must be ints, got shape {list(array.shape)} of {array.dtype}")
    if array.dtype.kind == "O":
        return np.array([min(max(value, _INT64.min), _INT64.max) for value in array.ravel()], np.int64).reshape(
            array.shape
        )
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(_INT64.max))
    return array.astype(np.int64)


def ranges_of(edges: Ints) -> Ints:
    """``[n, 2]`` ranges between the ``n + 1`` edges."""
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _is_whole(array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.kind == "O":
        return all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in array.flat)
    return array.dtype.kind in "iu"


def _to_int64(array: np.ndarray[Any, Any], name: str) -> Ints:
    if array.size and array.dtype.kind in "Ou" and not _INT64.min <= array.min() <= array.max() <= _INT64.max:
        raise ValueError(f"{name} must fit in int64, got values from {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _check_tokens(array: np.ndarray[Any, Any], name: str) -> None:
    if array.size and (array.max() > MOST_TOKENS or array.min() < -MOST_TOKENS):
        beyond = int(array.max() if array.max() > MOST_TOKENS else array.min())
        raise ValueError(
            f"{name} must stay within {MOST_TOKENS:,} tokens, which is what int32 ranges reach, got {beyond:,}"
        )


def _as_count(value: int, name: str, least: int) -> int:
    try:
        count = least - 1 if isinstance(value, (bool, np.bool_)) else index(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(f"{name} must be an int of {least} or more, got {value!r}")
    return count
