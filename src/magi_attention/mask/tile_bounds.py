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

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MaskMod = Callable[[Any, Any, Any, Any], Any]

# Beyond this, sums and products of indices might not be exact.
_LARGEST = 1 << 31
# Narrower ones wrap around earlier.
_DTYPES = (torch.bool, torch.int32, torch.int64)
# What torch's functions are called that say something else each time.
_RANDOM = ("rand", "bernoulli", "multinomial", "normal")


class NotReadableError(Exception):
    """The function does what ranges cannot follow; its cells have to be looked at."""


def tile_bounds(mask_mod: MaskMod, b: Any, h: Any, q_ranges: Tensor, k_ranges: Tensor) -> tuple[Tensor, Tensor]:
    """``(always, ever)``, ``[num_tile_rows, num_tile_columns]`` bool: attended in the whole tile, and perhaps somewhere in it.

    Args:
        b, h: indices as they are, ints or tensors without axes.
        q_ranges, k_ranges: ``[n, 2]`` int64, the half-open ranges of the tiles.

    Raises:
        NotReadableError: the function uses something else than comparisons, logic, sums, products and look-ups of ints.
    """
    q = _Range(q_ranges[:, :1], q_ranges[:, 1:] - 1)
    k = _Range(k_ranges[:, 0], k_ranges[:, 1] - 1)
    try:
        with _Follow():
            said = mask_mod(b, h, q, k)
    except NotReadableError:
        raise
    except Exception as error:  # whatever a user's function does with what is no tensor
        raise NotReadableError(str(error)) from error
    said = _as_range(said)
    if not said.is_flag:
        raise NotReadableError("it does not return a boolean")
    shape = (len(q_ranges), len(k_ranges))
    return (said.low > 0).expand(shape), (said.high > 0).expand(shape)


@dataclass(frozen=True, eq=False)
class _Range:
    """Values between ``low`` and ``high``, both of them included: int64 tensors that broadcast to the grid of tiles."""

    low: Tensor
    high: Tensor
    is_flag: bool = False

    def __bool__(self) -> bool:
        raise NotReadableError("it branches on a value")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotReadableError("it is called outside")  # inside, `_Follow` comes first


def _as_range(value: Any) -> _Range:
    if isinstance(value, _Range):
        return value
    if isinstance(value, (bool, int)):
        return _Range(torch.tensor(int(value)), torch.tensor(int(value)), isinstance(value, bool))
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in _DTYPES:
        number = value.to("cpu", torch.int64)
        return _Range(number, number, value.dtype == torch.bool)
    raise NotReadableError(f"it uses {type(value).__name__}")


def _within(value: _Range) -> _Range:
    """Refuse numbers so large that int32 in a kernel and int64 here might differ."""
    if value.low.numel() and max(value.low.abs().max().item(), value.high.abs().max().item()) >= _LARGEST:
        raise NotReadableError("its numbers leave int32")
    return value


def _flag(low: Tensor, high: Tensor) -> _Range:
    return _Range(low.to(torch.int64), high.to(torch.int64), True)


def _check_numbers(*ranges: _Range) -> None:
    if any(one.is_flag for one in ranges):
        raise NotReadableError("it calculates with booleans")


def _add(a: _Range, b: _Range) -> _Range:
    _check_numbers(a, b)
    return _within(_Range(a.low + b.low, a.high + b.high))


def _sub(a: _Range, b: _Range) -> _Range:
    _check_numbers(a, b)
    return _within(_Range(a.low - b.high, a.high - b.low))


def _mul(a: _Range, b: _Range) -> _Range:
    return _of_corners(operator.mul, a, b)


def _floordiv(a: _Range, b: _Range) -> _Range:
    if not bool((b.low > 0).all()):
        raise NotReadableError("it divides by what may not be positive")
    return _of_corners(lambda x, y: torch.div(x, y, rounding_mode="floor"), a, b)


def _of_corners(of: Callable[[Tensor, Tensor], Tensor], a: _Range, b: _Range) -> _Range:
    """For what is monotone in each argument, whatever the other is: the extremes lie at the corners."""
    _check_numbers(a, b)
    corners = of(a.low, b.low), of(a.low, b.high), of(a.high, b.low), of(a.high, b.high)
    return _within(_Range(reduce(torch.minimum, corners), reduce(torch.maximum, corners)))


def _mod(a: _Range, b: _Range) -> _Range:
    """Exact where no multiple of the divisor lies between; else anything below it."""
    _check_numbers(a, b)
    if not bool((b.low > 0).all()) or not bool((b.low == b.high).all()):
        raise NotReadableError("it takes a remainder of what is not one positive number")
    together = torch.div(a.low, b.low, rounding_mode="floor") == torch.div(a.high, b.low, rounding_mode="floor")
    low = torch.where(together, torch.remainder(a.low, b.low), 0)
    return _Range(low, torch.where(together, torch.remainder(a.high, b.low), b.low - 1))


def _eq(a: _Range, b: _Range) -> _Range:
    same = (a.low == b.high) & (a.high == b.low)
    return _flag(same, (a.low <= b.high) & (b.low <= a.high))


def _lt(a: _Range, b: _Range) -> _Range:
    return _flag(a.high < b.low, a.low < b.high)


def _le(a: _Range, b: _Range) -> _Range:
    return _flag(a.high <= b.low, a.low <= b.high)


def _not(a: _Range) -> _Range:
    if not a.is_flag:
        raise NotReadableError("it inverts bits of a number")
    return _Range(1 - a.high, 1 - a.low, True)


def _and(a: _Range, b: _Range) -> _Range:
    return _logic(torch.minimum, a, b)


def _or(a: _Range, b: _Range) -> _Range:
    return _logic(torch.maximum, a, b)


def _logic(of: Callable[[Tensor, Tensor], Tensor], a: _Range, b: _Range) -> _Range:
    if not (a.is_flag and b.is_flag):
        raise NotReadableError("it combines bits of numbers")
    return _Range(of(a.low, b.low), of(a.high, b.high), True)


def _xor(a: _Range, b: _Range) -> _Range:
    return _or(_and(a, _not(b)), _and(_not(a), b))


def _abs(a: _Range) -> _Range:
    _check_numbers(a)
    spans_zero = (a.low <= 0) & (a.high >= 0)
    low = torch.where(spans_zero, 0, torch.minimum(a.low.abs(), a.high.abs()))
    return _Range(low, torch.maximum(a.low.abs(), a.high.abs()))


def _least(a: _Range, b: _Range) -> _Range:
    _check_numbers(a, b)
    return _Range(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))


def _largest(a: _Range, b: _Range) -> _Range:
    _check_numbers(a, b)
    return _Range(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))


def _clamp(a: _Range, least: _Range, largest: _Range) -> _Range:
    return _least(_largest(a, least), largest)


def _where(flag: _Range, a: _Range, b: _Range) -> _Range:
    """One of the two where it is known which, else anything of either."""
    if not flag.is_flag or a.is_flag != b.is_flag:
        raise NotReadableError("it chooses by what is no boolean, or between a boolean and a number")
    yes, no = flag.low > 0, flag.high == 0
    low = torch.where(yes, a.low, torch.where(no, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(yes, a.high, torch.where(no, b.high, torch.maximum(a.high, b.high)))
    return _Range(low, high, a.is_flag)


_OPERATIONS: dict[str, Callable[..., _Range]] = {
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("mul", "rmul", "multiply"), _mul),
    **dict.fromkeys(("floordiv", "floor_divide"), _floordiv),
    **dict.fromkeys(("mod", "remainder"), _mod),
    **dict.fromkeys(("and", "rand", "logical_and", "bitwise_and"), _and),
    **dict.fromkeys(("or", "ror", "logical_or", "bitwise_or"), _or),
    **dict.fromkeys(("xor", "rxor", "logical_xor", "bitwise_xor"), _xor),
    **dict.fromkeys(("invert", "logical_not", "bitwise_not"), _not),
    **dict.fromkeys(("eq",), _eq),
    "rsub": lambda a, b: _sub(b, a),
    "rfloordiv": lambda a, b: _floordiv(b, a),
    "rmod": lambda a, b: _mod(b, a),
    "ne": lambda a, b: _not(_eq(a, b)),
    "lt": _lt,
    "le": _le,
    "gt": lambda a, b: _lt(b, a),
    "ge": lambda a, b: _le(b, a),
    "less": _lt,
    "greater": lambda a, b: _lt(b, a),
    "neg": lambda a: _sub(_as_range(0), a),
    "abs": _abs,
    "minimum": _least,
    "maximum": _largest,
    "clamp": _clamp,
    "where": _where,
}


def _method(of: Callable[..., _Range]) -> Callable[..., _Range]:
    return lambda self, *others: of(self, *(_as_range(other) for other in others))


# Operators and methods. Ranges are compared with `==`, and never hashed.
for _name, _operation in _OPERATIONS.items():
    setattr(_Range, f"__{_name}__", _method(_operation))
for _name in ("abs", "clamp"):
    setattr(_Range, _name, _method(_OPERATIONS[_name]))


@dataclass
class _Extremes:
    """The least and the largest of any stretch of a one-dimensional table: of all stretches of 1, 2, 4, ... entries."""

    table: Tensor
    lows: list[Tensor] = field(default_factory=list)
    highs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = self.table.to("cpu", torch.int64)
        self.lows, self.highs = [values], [values]
        width = 1
        while 2 * width <= len(values):
            for of, levels in ((torch.minimum, self.lows), (torch.maximum, self.highs)):
                levels.append(of(levels[-1][:-width], levels[-1][width:]))
            width *= 2

    def look_up(self, index: _Range) -> _Range:
        first, last = index.low, index.high
        if index.is_flag or not bool(((first >= 0) & (last < len(self.table)) & (first <= last)).all()):
            raise NotReadableError("it looks up what may lie outside a table")
        level = torch.log2((last - first + 1).double()).floor().to(torch.int64)
        low, high = torch.empty_like(first), torch.empty_like(first)
        for at in range(len(self.lows)):
            here = level == at
            left, right = first[here], last[here] - (1 << at) + 1
            low[here] = torch.minimum(self.lows[at][left], self.lows[at][right])
            high[here] = torch.maximum(self.highs[at][left], self.highs[at][right])
        return _Range(low, high, self.table.dtype == torch.bool)


class _Follow(TorchFunctionMode):
    """While active, torch's functions of ranges give ranges; those of tensors alone are left to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, _Extremes] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        if name.startswith(_RANDOM):
            raise NotReadableError("it draws random numbers")
        is_look_up = name == "getitem" and _holds_range(args[1])
        if not is_look_up and not any(isinstance(arg, _Range) for arg in args):
            return func(*args, **(kwargs or {}))
        if kwargs:
            raise NotReadableError(f"it uses {name} with options")
        if is_look_up:
            return self.look_up(*args)
        if name not in _OPERATIONS:
            raise NotReadableError(f"it uses {name}")
        return _OPERATIONS[name](*(_as_range(arg) for arg in args))

    def look_up(self, table: Any, index: Any) -> _Range:
        """``table[q]``, or ``table[b, q]`` with everything before the range a single index."""
        *before, last = index if isinstance(index, tuple) else (index,)
        if not isinstance(table, Tensor) or table.ndim != len(before) + 1 or table.dtype not in _DTYPES:
            raise NotReadableError("it looks up something else than a row of ints")
        if _holds_range(tuple(before)) or not isinstance(last, _Range):
            raise NotReadableError("it looks up a table by more than one range")
        if before:
            return _Extremes(table[tuple(before)]).look_up(last)
        if id(table) not in self.tables:  # which holds the table, so that its id stays its own
            self.tables[id(table)] = _Extremes(table)
        return self.tables[id(table)].look_up(last)


def _holds_range(index: Any) -> bool:
    return any(isinstance(one, _Range) for one in (index if isinstance(index, tuple) else (index,)))
