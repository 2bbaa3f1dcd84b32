"""What people do with indices, by the names that torch has for it, for `IndexRange`: its operators, methods and functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magi_attention.mask import index_ranges as ranges
from magi_attention.mask.index_ranges import NARROW, WIDE, IndexRange, NotReadableError, as_range


def apply(name: str, *args: Any, **options: Any) -> Any:
    """The torch function or method ``name`` of ranges, numbers and tensors without axes.

    Raises:
        NotReadableError: it is not followed, or not with these.
    """
    if name not in OPERATIONS:
        raise NotReadableError(f"it uses {name}")
    try:
        return OPERATIONS[name](*args, **options)
    except TypeError as error:
        raise NotReadableError(f"it uses {name} with arguments that are not followed ({error})") from error


def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> IndexRange:
    if rounding_mode is None:
        raise NotReadableError("it divides into floats (/ where // is of ints)")
    return ranges.divide(rounding_mode, as_range(a), as_range(b))


def _clamp(a: Any, min: Any = None, max: Any = None) -> IndexRange:
    value = as_range(a)
    value = value if min is None else ranges.maximum(value, as_range(min))
    return value if max is None else ranges.minimum(value, as_range(max))


def _isin(elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False) -> IndexRange:
    if not isinstance(test_elements, Tensor) or test_elements.dtype not in (torch.int32, torch.int64):
        raise NotReadableError("it uses isin of something else than indices among ints")
    value, among = as_range(elements), torch.unique(test_elements.to("cpu", torch.int64).flatten())
    ranges.check_numbers(value)
    found = torch.searchsorted(among, value.high.contiguous(), right=True) - torch.searchsorted(
        among, value.low.contiguous()
    )
    result = ranges.flag(found == value.high - value.low + 1, found > 0)
    return ranges.bit_not(result) if invert else result


def _cast(a: Any, dtype: torch.dtype | None = None) -> IndexRange:
    value = as_range(a)
    if dtype is None or dtype == value.dtype:
        return value
    if dtype == torch.bool:
        return ranges.truth(value)
    if dtype in WIDE:
        return ranges.within(IndexRange(value.low, value.high, dtype))
    bounds = torch.iinfo(dtype) if dtype in NARROW else None
    if bounds is None or (
        value.low.numel() and not bounds.min <= int(value.low.min()) <= int(value.high.max()) <= bounds.max
    ):
        raise NotReadableError(f"it converts an index to {dtype}")
    return IndexRange(value.low, value.high, dtype)


def _to(a: IndexRange, *targets: Any, dtype: torch.dtype | None = None, other: Any = None, **_: Any) -> IndexRange:
    """Devices, and how to copy, change no value."""
    for target in (*targets, other):
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, (Tensor, IndexRange)):
            dtype = target.dtype
    return _cast(a, dtype)


def _full(like: IndexRange, value: Any, dtype: torch.dtype | None, size: Any = ()) -> Any:
    if isinstance(value, IndexRange):
        return replace(_cast(value, dtype or like.dtype))
    return torch.full(tuple(size), value, dtype=dtype or like.dtype)


def _new_constant(value: int) -> Callable[..., Any]:
    def new(like: IndexRange, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        return _full(like, value, dtype, size[0] if size and not isinstance(size[0], int) else size)

    return new


def _new_full(like: IndexRange, size: Any, fill_value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return _full(like, fill_value, dtype, size)


def _new_tensor(like: IndexRange, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return replace(_cast(data, dtype)) if isinstance(data, IndexRange) else torch.tensor(data, dtype=dtype)


def _like_constant(value: int) -> Callable[..., Any]:
    return lambda like, dtype=None, **_: _full(like, value, dtype)


def _full_like(like: IndexRange, fill_value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return _full(like, fill_value, dtype)


def _of_ranges(of: Callable[..., IndexRange]) -> Callable[..., IndexRange]:
    return lambda *values: of(*(as_range(value) for value in values))


def _of_tensors(of: Callable[..., IndexRange]) -> Callable[..., IndexRange]:
    """``max(q, 0)`` of torch is no maximum of two: it reduces along an axis."""

    def of_two(a: Any, b: Any) -> IndexRange:
        if not all(isinstance(value, (IndexRange, Tensor)) for value in (a, b)):
            raise NotReadableError("it reduces along an axis")
        return of(as_range(a), as_range(b))

    return of_two


def _swapped(of: Callable[..., IndexRange]) -> Callable[..., IndexRange]:
    return lambda a, b: of(b, a)


def _names(names: str, of: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names.split(), of)


def _of_truths(of: Callable[..., IndexRange]) -> Callable[..., IndexRange]:
    return lambda *values: of(*(ranges.truth(as_range(value)) for value in values))


_equal, _less, _less_equal = (ranges.comparison(of) for of in (ranges.equal, ranges.less, ranges.less_equal))

# As torch's functions and methods are called, without underscores.
OPERATIONS: dict[str, Callable[..., Any]] = {
    **_names("add radd", _of_ranges(ranges.add)),
    **_names("sub subtract", _of_ranges(ranges.subtract)),
    **_names("mul rmul multiply", _of_ranges(ranges.multiply)),
    **_names("floordiv floor_divide", _of_ranges(ranges.floor_divide)),
    **_names("mod remainder", _of_ranges(ranges.remainder)),
    **_names("div divide truediv true_divide rtruediv rdiv", _div),
    **_names("pow", _of_ranges(ranges.power)),
    **_names("square", lambda a: ranges.power(as_range(a), as_range(2))),
    **_names("lshift bitwise_left_shift", _of_ranges(ranges.shift_left)),
    **_names("rshift bitwise_right_shift", _of_ranges(ranges.shift_right)),
    **_names("and rand bitwise_and", _of_ranges(ranges.bit_and)),
    **_names("or ror bitwise_or", _of_ranges(ranges.bit_or)),
    **_names("xor rxor bitwise_xor", _of_ranges(ranges.bit_xor)),
    **_names("logical_and", _of_truths(ranges.bit_and)),
    **_names("logical_or", _of_truths(ranges.bit_or)),
    **_names("logical_xor", _of_truths(ranges.bit_xor)),
    **_names("logical_not", _of_truths(ranges.bit_not)),
    **_names("invert bitwise_not", _of_ranges(ranges.bit_not)),
    **_names("rsub", _swapped(_of_ranges(ranges.subtract))),
    **_names("rfloordiv", _swapped(_of_ranges(ranges.floor_divide))),
    **_names("rmod", _swapped(_of_ranges(ranges.remainder))),
    **_names("eq", _equal),
    **_names("ne not_equal", lambda a, b: ranges.bit_not(_equal(a, b))),
    **_names("lt less", _less),
    **_names("le less_equal", _less_equal),
    **_names("gt greater", _swapped(_less)),
    **_names("ge greater_equal", _swapped(_less_equal)),
    **_names("neg negative", lambda a: ranges.subtract(as_range(0), as_range(a))),
    **_names("abs absolute", _of_ranges(ranges.absolute)),
    **_names("sign sgn", _of_ranges(ranges.sign)),
    **_names("minimum min", _of_tensors(ranges.minimum)),
    **_names("maximum max", _of_tensors(ranges.maximum)),
    **_names("clamp clip", _clamp),
    **_names("clamp_min", lambda a, min: _clamp(a, min)),
    **_names("clamp_max", lambda a, max: _clamp(a, None, max)),
    **_names("where", _of_ranges(ranges.where)),
    **_names("isin", _isin),
    **_names("pos positive detach contiguous cpu cuda", lambda a, **_: as_range(a)),
    **_names("clone floor ceil trunc round", lambda a, **_: replace(as_range(a))),
    **_names("to type_as", _to),
    **_names("type", lambda a, dtype: _cast(a, dtype)),
    **{
        name: partial(lambda dtype, a: _cast(a, dtype), dtype)
        for name, dtype in (
            ("bool", torch.bool),
            ("int", torch.int32),
            ("long", torch.int64),
            ("byte", torch.uint8),
            ("char", torch.int8),
            ("short", torch.int16),
            ("half", torch.float16),
            ("bfloat16", torch.bfloat16),
            ("float", torch.float32),
            ("double", torch.float64),
        )
    },
    "new_ones": _new_constant(1),
    "new_zeros": _new_constant(0),
    "new_full": _new_full,
    "new_tensor": _new_tensor,
    "ones_like": _like_constant(1),
    "zeros_like": _like_constant(0),
    "full_like": _full_like,
}

_OPERATORS = (
    "add radd sub rsub mul rmul floordiv rfloordiv mod rmod truediv rtruediv pow lshift rshift and rand or ror xor rxor "
    "invert neg pos abs eq ne lt le gt ge"
)
_IN_PLACE = "add sub mul floordiv mod lshift rshift and or xor"


def _method(name: str) -> Callable[..., Any]:
    return lambda self, *others: apply(name, self, *others)


def _in_place(name: str) -> Callable[..., Any]:
    def change(self: IndexRange, other: Any) -> IndexRange:
        result = apply(name, self, other)
        if result.is_flag != self.is_flag:
            raise NotReadableError("it writes numbers among booleans, or the other way round")
        self.low, self.high = result.low, result.high
        return self

    return change


def _attribute(self: IndexRange, name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name == "where":
        return lambda condition, other: apply("where", condition, self, other)
    if name in OPERATIONS:
        return partial(apply, name, self)
    raise NotReadableError(f"it uses Tensor.{name}")


for _name in _OPERATORS.split():
    setattr(IndexRange, f"__{_name}__", _method(_name))
for _name in _IN_PLACE.split():
    setattr(IndexRange, f"__i{_name}__", _in_place(_name))
IndexRange.__getattr__ = _attribute  # type: ignore[attr-defined]
