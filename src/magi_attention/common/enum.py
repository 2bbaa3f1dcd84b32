"""The closed sets of names that the public API uses."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import SupportsIndex


class AttnMaskType(Enum):
    """Which cells of the rectangle ``[q0, q1) x [k0, k1)`` a slice attends; constructible from its string.

    ``FULL`` (0): all. ``CAUSAL`` (1, bottom-right aligned): ``j - i <= k1 - q1``. ``INVCAUSAL`` (2, top-left aligned):
    ``j - i >= k0 - q0``. ``BICAUSAL`` (3): both.
    """

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"

    @classmethod
    def from_int_type(cls, int_type: int) -> AttnMaskType:
        """The type of an int in 0..3.

        Raises:
            ValueError: another int.
        """
        members = list(cls)
        if not 0 <= int_type < len(members):
            raise ValueError(
                f"a mask type as an int is 0 (full), 1 (causal), 2 (inv_causal) or 3 (bi_causal), got {int_type}"
            )
        return members[int_type]

    def to_int_type(self) -> int:
        """0..3, in the order above."""
        return list(AttnMaskType).index(self)

    @classmethod
    def _missing_(cls, value: object) -> AttnMaskType:
        names = ", ".join(f'"{member.value}"' for member in cls)
        raise ValueError(f"a mask type must be one of {names}, or an AttnMaskType, got {value!r}")


def to_mask_types(
    types: str | AttnMaskType | int | Iterable[str | AttnMaskType | int], num_slices: int
) -> list[AttnMaskType]:
    """One type for all slices, or one for each, as a list of ``num_slices`` enums. A type is an enum, its string or its int.

    Raises:
        ValueError: a name that is no mask type, or another number of types than slices.
    """
    if isinstance(types, str) or not isinstance(types, Iterable):
        return [_to_mask_type(types)] * num_slices
    result = [_to_mask_type(one) for one in types]
    if len(result) != num_slices:
        raise ValueError(
            f"a mask needs one type for all slices or one for each of the {num_slices}, got {len(result)} types"
        )
    return result


def _to_mask_type(one: str | AttnMaskType | int) -> AttnMaskType:
    if isinstance(one, (str, AttnMaskType)) or not isinstance(one, SupportsIndex):
        return AttnMaskType(one)
    return AttnMaskType.from_int_type(int(one))


class AttnRole(Enum):
    """Which side of attention a tensor is on. KEY and VALUE are one side."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"


class AttnType(Enum):
    """Whether keys are made of the same rows as queries."""

    SELF_ATTN = "self_attn"
    CROSS_ATTN = "cross_attn"


class AttnOverlapMode(Enum):
    """Whether the number of stages is given (STATIC) or chosen by predicted time (DYNAMIC)."""

    STATIC = "static"
    DYNAMIC = "dynamic"


class DispatchAlgType(Enum):
    """Names of the dispatch algorithms; each has a class in `magi_attention.config`."""

    LOWER_BOUND = "lower_bound"
    DYNAMIC_PROGRAMMING = "dynamic_programming"
    BINARY_SEARCH = "binary_search"
    MIN_HEAP = "min_heap"
    TOPP_HEAP = "topp_heap"
    SEQUENTIAL_SELECT = "sequential_select"
    SORTED_SEQUENTIAL_SELECT = "sorted_sequential_select"
    AFFINITY = "affinity"


class OverlapAlgType(Enum):
    """Names of the ways to deal remote rows to stages; each has a class in `magi_attention.config`."""

    UNIFORM = "uniform"
    GREEDY = "greedy"
