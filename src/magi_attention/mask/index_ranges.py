"""Ranges in place of indices: what a ``mask_mod`` calculates with them is the range in which its results lie.

A `IndexRange` answers to the operators, methods and torch functions that people use on indices. Every other use of it is a
`NotReadableError` that names it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

# Beyond this, sums and products of indices might not be exact.
_LARGEST = 1 << 31
# Up to here float32, in which torch compares an int with a float, holds every int.
_LARGEST_AS_FLOAT = 1 << 24
WIDE = (torch.int32, torch.int64)
# These wrap around earlier: they are compared and looked up, and nothing is calculated with them.
NARROW = (torch.uint8, torch.int8, torch.int16)
DTYPES = (torch.bool, *WIDE, *NARROW)


class NotReadableError(Exception):
    """The function does what ranges cannot follow; its cells have to be looked at. The message says what: "it ..."."""


@dataclass(eq=False)
class IndexRange:
    """Values between ``low`` and ``high``, both of them included: int64 tensors that broadcast to the grid of tiles.

    ``dtype``: of the values, as torch would have them; results of int32 are called int64. Writing in place binds other tensors to
    the same object, so that all its names see it.
    """

    low: Tensor
    high: Tensor
    dtype: torch.dtype = torch.int64

    @property
    def is_flag(self) -> bool:
        return self.dtype == torch.bool

    @property
    def device(self) -> torch.device:
        """Ranges are on the CPU, whatever the device on which cells are evaluated."""
        return torch.device("cpu")

    def __bool__(self) -> bool:
        raise NotReadableError("it branches on a value")

    def __hash__(self) -> int:
        raise NotReadableError("it hashes an index")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotReadableError("it is called outside")  # inside, the mode of `tile_bounds` comes first


def as_range(value: Any) -> IndexRange:
    if isinstance(value, IndexRange):
        return value
    if isinstance(value, (bool, int)):
        if not -(1 << 63) <= value < 1 << 63:
            raise NotReadableError(f"it uses {value}, which int64 does not hold")
        number = torch.tensor(int(value))
        return IndexRange(number, number, torch.bool if isinstance(value, bool) else torch.int64)
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in DTYPES:
        number = value.to("cpu", torch.int64)
        return IndexRange(number, number, value.dtype)
    if isinstance(value, Tensor):
        raise NotReadableError(f"it uses a tensor of shape {list(value.shape)} and {value.dtype} beside an index")
    raise NotReadableError(f"it uses a {type(value).__name__} beside an index")


def extent(value: IndexRange) -> int:
    """The largest absolute value that there may be."""
    return max(int(value.low.abs().max()), int(value.high.abs().max())) if value.low.numel() else 0


def within(value: IndexRange) -> IndexRange:
    """Refuse numbers so large that int32 in a kernel and int64 here might differ."""
    if extent(value) >= _LARGEST:
        raise NotReadableError("its numbers leave int32")
    return value


def flag(low: Tensor, high: Tensor) -> IndexRange:
    return IndexRange(low.to(torch.int64), high.to(torch.int64), torch.bool)


def check_numbers(*ranges: IndexRange) -> None:
    """What is calculated with: wide numbers, or one of them and a boolean, which is 0 or 1 then."""
    if all(one.is_flag for one in ranges):
        raise NotReadableError("it calculates with booleans alone")
    for one in ranges:
        if one.dtype in NARROW:
            raise NotReadableError(f"it calculates with {one.dtype}, which wraps around")


def add(a: IndexRange, b: IndexRange) -> IndexRange:
    check_numbers(a, b)
    return within(IndexRange(a.low + b.low, a.high + b.high))


def subtract(a: IndexRange, b: IndexRange) -> IndexRange:
    check_numbers(a, b)
    return within(IndexRange(a.low - b.high, a.high - b.low))


def multiply(a: IndexRange, b: IndexRange) -> IndexRange:
    if max(extent(a), 1) * max(extent(b), 1) >= 1 << 62:
        raise NotReadableError("its numbers leave int32")
    return _of_corners(operator.mul, a, b)


def floor_divide(a: IndexRange, b: IndexRange) -> IndexRange:
    return divide("floor", a, b)


def divide(rounding: str, a: IndexRange, b: IndexRange) -> IndexRange:
    if not bool(((b.low > 0) | (b.high < 0)).all()):
        raise NotReadableError("it divides by what may be 0")
    return _of_corners(lambda x, y: torch.div(x, y, rounding_mode=rounding), a, b)


def _of_corners(of: Callable[[Tensor, Tensor], Tensor], a: IndexRange, b: IndexRange) -> IndexRange:
    """For what is monotone in each argument, whatever the other is: the extremes lie at the corners."""
    check_numbers(a, b)
    corners = of(a.low, b.low), of(a.low, b.high), of(a.high, b.low), of(a.high, b.high)
    return within(IndexRange(reduce(torch.minimum, corners), reduce(torch.maximum, corners)))


def remainder(a: IndexRange, b: IndexRange) -> IndexRange:
    """Exact where no multiple of the divisor lies between; else anything below it."""
    check_numbers(a, b)
    if not bool((b.low > 0).all()) or not bool((b.low == b.high).all()):
        raise NotReadableError("it takes a remainder of what is not one positive number")
    together = torch.div(a.low, b.low, rounding_mode="floor") == torch.div(a.high, b.low, rounding_mode="floor")
    low = torch.where(together, torch.remainder(a.low, b.low), 0)
    return IndexRange(low, torch.where(together, torch.remainder(a.high, b.low), b.low - 1))


def power(a: IndexRange, b: IndexRange) -> IndexRange:
    exponent = _constant(b)
    if not 0 <= exponent <= 31 or max(extent(a), 1) ** exponent >= _LARGEST:
        raise NotReadableError("it takes a power that may leave int32")
    check_numbers(a)
    base = absolute(a) if exponent % 2 == 0 else a
    return IndexRange(base.low**exponent, base.high**exponent)


def shift_left(a: IndexRange, b: IndexRange) -> IndexRange:
    return multiply(a, as_range(1 << _shift(b)))


def shift_right(a: IndexRange, b: IndexRange) -> IndexRange:
    return floor_divide(a, as_range(1 << _shift(b)))


def _shift(b: IndexRange) -> int:
    by = _constant(b)
    if not 0 <= by < 31:
        raise NotReadableError(f"it shifts by {by} bits")
    return by


def _constant(value: IndexRange) -> int:
    if value.low.numel() != 1 or not bool((value.low == value.high).all()):
        raise NotReadableError("it shifts bits by, or takes a power of, or masks with what is not one number")
    return int(value.low)


def comparison(of: Callable[[IndexRange, IndexRange], IndexRange]) -> Callable[[Any, Any], IndexRange]:
    def compare(a: Any, b: Any) -> IndexRange:
        a, b = _beside_float(a, b), _beside_float(b, a)
        for one, other in ((a, b), (b, a)):
            if one.dtype in NARROW and one.dtype != other.dtype:
                bounds = torch.iinfo(one.dtype)
                if other.low.numel() and not bounds.min <= int(other.low.min()) <= int(other.high.max()) <= bounds.max:
                    raise NotReadableError(f"it compares {one.dtype} with numbers that it does not hold")
        return of(a, b)

    return compare


def _beside_float(value: Any, other: Any) -> IndexRange:
    """A float as the two ints that it lies between: torch compares it, as float32, with ints as float32."""
    if not isinstance(value, float):
        return as_range(value)
    if extent(as_range(other)) > _LARGEST_AS_FLOAT or math.isnan(value):
        raise NotReadableError("it compares with a float what float32 does not hold")
    value = max(-_LARGEST, min(value, _LARGEST))
    near = float(torch.tensor(value, dtype=torch.float32))
    return IndexRange(torch.tensor(math.floor(min(near, value))), torch.tensor(math.ceil(max(near, value))))


def equal(a: IndexRange, b: IndexRange) -> IndexRange:
    same = (a.low == b.high) & (a.high == b.low)
    return flag(same, (a.low <= b.high) & (b.low <= a.high))


def less(a: IndexRange, b: IndexRange) -> IndexRange:
    return flag(a.high < b.low, a.low < b.high)


def less_equal(a: IndexRange, b: IndexRange) -> IndexRange:
    return flag(a.high <= b.low, a.low <= b.high)


def bit_not(a: IndexRange) -> IndexRange:
    if not a.is_flag:
        raise NotReadableError("it inverts bits of a number")
    return flag(1 - a.high, 1 - a.low)


def bit_and(a: IndexRange, b: IndexRange) -> IndexRange:
    if a.is_flag and b.is_flag:
        return flag(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))
    return _low_bits(a, b) if b.low.numel() == 1 else _low_bits(b, a)


def _low_bits(a: IndexRange, mask: IndexRange) -> IndexRange:
    """``a & (2^n - 1)`` is a remainder, ``a & -(2^n)`` what is left without it."""
    check_numbers(a, mask)
    if a.is_flag or mask.is_flag:
        raise NotReadableError("it combines bits of a number and a boolean")
    bits = _constant(mask)
    if bits >= 0 and bits & (bits + 1) == 0:
        return remainder(a, as_range(bits + 1))
    if bits < 0 and -bits & (-bits - 1) == 0:
        return multiply(floor_divide(a, as_range(-bits)), as_range(-bits))
    raise NotReadableError(f"it takes the bits {bits} of a number")


def bit_or(a: IndexRange, b: IndexRange) -> IndexRange:
    if not (a.is_flag and b.is_flag):
        raise NotReadableError("it combines bits of numbers")
    return flag(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))


def bit_xor(a: IndexRange, b: IndexRange) -> IndexRange:
    return bit_or(bit_and(a, bit_not(b)), bit_and(bit_not(a), b))


def truth(a: IndexRange) -> IndexRange:
    """Whether it is another number than 0."""
    return a if a.is_flag else bit_not(equal(a, as_range(0)))


def absolute(a: IndexRange) -> IndexRange:
    check_numbers(a)
    spans_zero = (a.low <= 0) & (a.high >= 0)
    low = torch.where(spans_zero, 0, torch.minimum(a.low.abs(), a.high.abs()))
    return IndexRange(low, torch.maximum(a.low.abs(), a.high.abs()))


def sign(a: IndexRange) -> IndexRange:
    check_numbers(a)
    return IndexRange(torch.sign(a.low), torch.sign(a.high))


def minimum(a: IndexRange, b: IndexRange) -> IndexRange:
    check_numbers(a, b)
    return IndexRange(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))


def maximum(a: IndexRange, b: IndexRange) -> IndexRange:
    check_numbers(a, b)
    return IndexRange(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))


def where(condition: IndexRange, a: IndexRange, b: IndexRange) -> IndexRange:
    """One of the two where it is known which, else anything of either."""
    if not condition.is_flag:
        raise NotReadableError("it chooses by what is no boolean")
    if a.dtype != b.dtype:
        check_numbers(a, b)
    yes, no = condition.low > 0, condition.high == 0
    low = torch.where(yes, a.low, torch.where(no, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(yes, a.high, torch.where(no, b.high, torch.maximum(a.high, b.high)))
    return IndexRange(low, high, a.dtype if a.dtype == b.dtype else torch.int64)
