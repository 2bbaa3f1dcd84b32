"""What a ``mask_mod`` says of whole tiles, proved without looking at their cells: interval arithmetic.

The function is called once with ranges in place of indices: ``q`` stands for all queries of a tile at once. Every operation gives the
range in which its results lie, so a comparison is known to be true, known to be false, or not known, and then the tile's cells have to be
looked at. For ``(doc[q] == doc[k]) & (q >= k)`` and tiles of 2 x 2, with documents of 3 and 5 tokens:

    ?...    1: true in the whole tile    ?: not known
    ??..    .: false in the whole tile
    .??.
    .?1?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from magi_attention.mask.index_operations import apply
from magi_attention.mask.index_ranges import DTYPES, IndexRange, NotReadableError, as_range

MaskMod = Callable[[Any, Any, Any, Any], Any]

# What torch's functions are called that say something else each time.
_RANDOM = ("rand", "bernoulli", "multinomial", "normal")
# Entries of a table that is looked up by queries and keys: bounds the memory.
_MOST_ENTRIES = 1 << 28


def tile_bounds(mask_mod: MaskMod, b: Any, h: Any, q_ranges: Tensor, k_ranges: Tensor) -> tuple[Tensor, Tensor]:
    """``(always, ever)``, ``[num_tile_rows, num_tile_columns]`` bool: attended in the whole tile, and perhaps somewhere in it.

    Args:
        b, h: indices as they are, ints or tensors without axes.
        q_ranges, k_ranges: ``[n, 2]`` int64, the half-open ranges of the tiles.

    Raises:
        NotReadableError: the function uses something else than comparisons, logic, sums, products and look-ups of ints.
    """
    q = IndexRange(q_ranges[:, :1], q_ranges[:, 1:] - 1)
    k = IndexRange(k_ranges[:, 0], k_ranges[:, 1] - 1)
    follow = _Follow()
    try:
        with follow:
            said = mask_mod(b, h, q, k)
    except NotReadableError:
        raise
    except Exception as error:  # whatever a user's function does with what is no tensor
        raise NotReadableError(f"it fails on ranges of indices ({type(error).__name__}: {error})") from error
    said = as_range(said)
    if not said.is_flag:
        raise NotReadableError("it does not return a boolean")
    shape = (len(q_ranges), len(k_ranges))
    is_open = follow.is_open.expand(shape)  # whatever was found there
    return (said.low > 0).expand(shape) & ~is_open, (said.high > 0).expand(shape) | is_open


class _Follow(TorchFunctionMode):
    """While active, torch's functions of ranges give ranges; those of tensors alone are left to torch.

    ``is_open``: the tiles of which some cell may look up what lies outside a table, or from its end. Such a cell may fail, so
    all cells of these tiles are evaluated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_open = torch.zeros(1, 1, dtype=torch.bool)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called, options = func.__name__, kwargs or {}
        name = called.strip("_")
        if name.startswith(_RANDOM):
            raise NotReadableError("it draws random numbers")
        if name == "getitem" and _holds_range(args[1]):
            return self.look_up(*args)
        if not _holds_range((*args, *options.values())):
            return func(*args, **options)
        if called.endswith("_") and not called.endswith("__"):
            raise NotReadableError(f"it writes into a tensor ({called})")
        if name == "take":
            return self.look_up(args[0].flatten(), *args[1:], **options)
        return apply(name, *args, **options)

    def look_up(self, table: Any, index: Any) -> IndexRange:
        """``table[q]``, ``table[b, q]``, ``table[q // 8, k // 8]``: one index for each axis, ranges at one or two of them."""
        at = index if isinstance(index, tuple) else (index,)
        if not isinstance(table, Tensor) or table.dtype not in DTYPES:
            raise NotReadableError("it looks up something else than a tensor of ints or booleans")
        if len(at) != table.ndim or not all(_is_index(one) for one in at):
            raise NotReadableError(
                f"it looks up a tensor of shape {list(table.shape)} other than by one index for each axis"
            )
        varying = [one for one in at if isinstance(one, IndexRange)]
        table = table[tuple(slice(None) if isinstance(one, IndexRange) else one for one in at)].cpu()
        if len(varying) > 2 or 0 in table.shape or table.numel() > _MOST_ENTRIES:
            raise NotReadableError(
                f"it looks up a tensor of shape {list(table.shape)} by {len(varying)} indices that vary"
            )
        is_open = torch.zeros((), dtype=torch.bool)
        for one, length in zip(varying, table.shape, strict=True):
            is_open = is_open | (one.low < 0) | (one.high >= length)
        firsts, lasts = (
            [edge.clamp(0, length - 1) for edge, length in zip(edges, table.shape, strict=True)]
            for edges in ([one.low for one in varying], [one.high for one in varying])
        )
        low, high = (_extremes(table, firsts, lasts, of) for of in (torch.minimum, torch.maximum))
        if bool(is_open.any()):
            self.is_open = self.is_open | is_open
            low, high = torch.where(is_open, table.min(), low), torch.where(is_open, table.max(), high)
        return IndexRange(low.to(torch.int64), high.to(torch.int64), table.dtype)


def _extremes(
    table: Tensor, firsts: list[Tensor], lasts: list[Tensor], of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The least or the largest entry of each stretch ``firsts .. lasts`` of a table, or of each rectangle of two stretches."""
    if table.dtype == torch.bool:
        table = table.to(torch.uint8)
    if len(firsts) == 1:
        return _of_stretches(table, firsts[0].flatten(), lasts[0].flatten(), of).reshape(firsts[0].shape)
    rows, columns = (first.reshape(1, -1) if first.ndim < 2 else first for first in firsts)
    if rows.shape[0] == 1 and columns.shape[1] == 1 and max(rows.shape[1], columns.shape[0]) > 1:
        return _extremes(table.T, firsts[::-1], lasts[::-1], of)
    if rows.shape[1] != 1 or columns.shape[0] != 1:
        raise NotReadableError("it looks up a table by two indices that are not one of queries and one of keys")
    by_row = _of_stretches(table, firsts[0].flatten(), lasts[0].flatten(), of)
    return _of_stretches(by_row.T.contiguous(), firsts[1].flatten(), lasts[1].flatten(), of).T


def _of_stretches(table: Tensor, first: Tensor, last: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``[n, ...]``: extremes along axis 0 of ``table[first[i] : last[i] + 1]``, of which two stretches of 2^level entries make any."""
    level = torch.log2((last - first + 1).double()).floor().to(torch.int64)
    result = table.new_empty((len(first), *table.shape[1:]))
    for at in range(int(level.max()) + 1 if len(level) else 0):
        here = level == at
        result[here] = of(table[first[here]], table[last[here] - (1 << at) + 1])
        if len(table) > 1 << at:
            table = of(table[: -(1 << at)], table[1 << at :])
    return result


def _is_index(one: Any) -> bool:
    if isinstance(one, IndexRange):
        return not one.is_flag
    if isinstance(one, Tensor):
        return one.ndim == 0 and one.dtype in DTYPES and one.dtype not in (torch.bool, torch.uint8)
    return isinstance(one, int) and not isinstance(one, bool)


def _holds_range(values: Any) -> bool:
    if isinstance(values, IndexRange):
        return True
    return isinstance(values, (tuple, list)) and any(_holds_range(one) for one in values)
