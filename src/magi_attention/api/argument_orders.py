"""Calls of programs already written, in whichever released order they pass their arguments.

    v1.0      ...,                                       pad_size, chunk_size, cp_group_or_mesh, ...     refused: it has no heads
    v1.1.0    ..., num_heads_q, num_heads_kv, head_dim,  pad_size, chunk_size, cp_group_or_mesh, ...
    v1.1.1    ..., num_heads_q, num_heads_kv, head_dim,  pad_size, cp_group_or_mesh, ..., chunk_size

The last two are told apart by the first argument whose type fits only one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from operator import index
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch.distributed as dist

from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask

P = ParamSpec("P")
R = TypeVar("R")

HEADS = ("num_heads_q", "num_heads_kv", "head_dim")


def in_both_orders(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose parameters stand in v1.1.0's order, for calls in v1.1.1's too. Its signature stays what `help` shows."""
    parameters = inspect.signature(function).parameters.values()
    names = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    at = names.index("pad_size")
    leading, older = names[:at], names[at:]
    newer = [*(name for name in older if name != "chunk_size"), "chunk_size"]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        _refuse_a_mask(function.__name__, (*args, *kwargs.values()))
        _refuse_without_heads(function.__name__, leading, args, kwargs)
        rest = args[at:]
        if len(rest) > len(older):
            return function(*args, **kwargs)  # type: ignore[arg-type] # which says how many it takes
        order = _order_of(function.__name__, rest, kwargs, older, newer)
        named = dict(zip(order, rest, strict=False))
        return function(*args[:at], **named, **kwargs)  # type: ignore[arg-type]

    return call  # type: ignore[return-value]


def in_both_orders_of_heads(function: Callable[P, R]) -> Callable[P, R]:
    """``function(4 arguments, dist_attn_config, *, heads)``, as in v1.1.0, for calls with the heads before the config too, as in v1.1.1."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        rest = args[4:]
        is_config = len(rest) == 1 and (rest[0] is None or isinstance(rest[0], DistAttnConfig))
        if (is_config and "dist_attn_config" not in kwargs) or len(rest) > 4:
            return function(*args, **kwargs)  # type: ignore[arg-type]
        named = dict(zip((*HEADS, "dist_attn_config"), rest, strict=False))
        return function(*args[:4], **named, **kwargs)  # type: ignore[arg-type]

    return call  # type: ignore[return-value]


def after_x(key_function: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function of ``x`` and the arguments of ``key_function``: the signature that `help` shows."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function)
        parameters = [own.parameters["x"], *inspect.signature(key_function).parameters.values()]
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def _order_of(
    function: str, rest: Sequence[Any], keywords: Mapping[str, Any], older: list[str], newer: list[str]
) -> list[str]:
    """``older`` or ``newer``: the names of ``rest``, the arguments from pad_size on that were given by position."""
    # Python has no call in which an argument is given by position and by keyword.
    orders = [order for order in (older, newer) if not keywords.keys() & set(order[: len(rest)])] or [older]
    for at, value in enumerate(rest):
        fitting = [order for order in orders if _fits(order[at], value)]
        if at == 1 and not fitting and len(orders) == 2:
            raise ValueError(
                f"{function}: after pad_size comes chunk_size, an int, or cp_group_or_mesh, a ProcessGroup or DeviceMesh, or None for "
                f"either; got {value!r}"
            )
        if fitting:
            orders = fitting
        if len(orders) == 1:
            break
    return orders[0]


def _fits(name: str, value: Any) -> bool:
    """Whether ``value`` may be the argument ``name``, by its type."""
    if name in ("pad_size", "chunk_size"):
        return value is None or (_is_int(value) and not _is_group(value))
    if name == "cp_group_or_mesh":
        return value is None or _is_group(value)
    if name == "window_size":
        return isinstance(value, (tuple, list))
    if name == "dist_attn_config":
        return isinstance(value, DistAttnConfig)
    return isinstance(value, (bool, np.bool_))


def _is_int(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_group(value: Any) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, (dist.ProcessGroup, DeviceMesh)) or value is dist.GroupMember.NON_GROUP_MEMBER


def _refuse_a_mask(function: str, values: Sequence[Any]) -> None:
    if any(isinstance(value, AttnMask) for value in values):
        raise ValueError(
            f"{function} takes a mask in parts, got an AttnMask; call magi_attn_key(mask, num_heads_q, num_heads_kv, head_dim)"
        )


def _refuse_without_heads(function: str, leading: list[str], args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """ValueError where the mask is there and the heads are not: v1.0 had none."""
    given = {**dict(zip(leading, args, strict=False)), **keywords}
    *mask, last = [name for name in leading if name not in HEADS]
    if not all(name in given for name in (*mask, last)):
        return  # Python says what is missing
    if all(name in given and _is_scalar(given[name]) for name in HEADS):
        return
    came = ", ".join(f"{name}={_shown(given[name])}" if name in given else f"no {name}" for name in HEADS)
    raise ValueError(
        f"{function} takes num_heads_q, num_heads_kv and head_dim after {last}, got {came}. Calls written for v1.0 have none of the "
        "three: add them"
    )


def _is_scalar(value: Any) -> bool:
    """Whether ``value`` may be meant as a number, right or wrong."""
    return isinstance(value, (bool, float, str)) or (_is_int(value) and not _is_group(value))


def _shown(value: Any) -> str:
    return repr(value) if value is None or _is_scalar(value) else f"a {type(value).__name__}"
