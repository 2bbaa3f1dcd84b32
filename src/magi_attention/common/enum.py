"""The closed sets of names that the public API uses."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias

if TYPE_CHECKING:
    import torch

# Names that programs already written import.
GroupReduceOp: TypeAlias = Literal["sum", "avg", "lse"]
AttnSinkLayout: TypeAlias = Literal["sh", "shd", "ssh"]


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


class DynamicAttnAlgType(Enum):
    """Names of MagiAttention's planners that move queries; kept for programs already written, and used by nothing here."""

    NON_COMMUNICATION_QO = "non_communication_qo"
    GREEDY_RANDOM_GRID = "greedy_random_grid"
    SIMPLEX_NETWORK_FLOW = "simplex_network_flow"
    FAST_SIMPLEX_NETWORK_FLOW = "fast_simplex_network_flow"
    BINARY_GREEDY = "binary_greedy"
    BINARY_GREEDY_PARALLEL = "binary_greedy_parallel"


class MagiAttentionKernelBackend(Enum):
    """What ``MAGI_ATTENTION_KERNEL_BACKEND`` may be set to; ``FA4`` is refused there."""

    FFA = "ffa"
    SDPA = "sdpa"
    SDPA_OL = "sdpa_ol"
    FA4 = "fa4"


class MagiAttentionPrecision(Enum):
    """What ``MAGI_ATTENTION_PRECISION`` may be set to."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP64 = "fp64"

    def to_torch_dtype(self) -> torch.dtype:
        """The dtype of that name."""
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
        return dtypes[self.value]
