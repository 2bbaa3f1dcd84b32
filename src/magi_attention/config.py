"""How attention is spread over ranks. All values here are frozen, hashable, and checked when made.

No field changes what is computed: outputs and gradients are those of the mask, up to the rounding of another order of summation.
What each changes is balance, bytes moved, and how much of the moving is hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from magi_attention.common.enum import AttnOverlapMode, DispatchAlgType, OverlapAlgType


@dataclass(frozen=True)
class DispatchAlg:
    """How chunks are dealt to ranks. Use one of the classes below; ``type`` is its name."""

    type: ClassVar[DispatchAlgType]


@dataclass(frozen=True)
class MinHeapDispatchAlg(DispatchAlg):
    """Largest area first, each to the least loaded rank. Balances best for its cost; knows nothing of what must move."""

    type: ClassVar[DispatchAlgType] = DispatchAlgType.MIN_HEAP


@dataclass(frozen=True)
class SequentialDispatchAlg(DispatchAlg):
    """Chunks in order. What a side that is not permutable gets."""

    type: ClassVar[DispatchAlgType] = DispatchAlgType.SEQUENTIAL_SELECT


@dataclass(frozen=True)
class SortedSequentialSelectAlg(DispatchAlg):
    """Chunks by falling area, dealt in turn, forwards and backwards. ``allocation_ratio`` is kept for callers and changes nothing."""

    allocation_ratio: float = 1.0
    type: ClassVar[DispatchAlgType] = DispatchAlgType.SORTED_SEQUENTIAL_SELECT

    def __post_init__(self) -> None:
        _check_share("allocation_ratio", self.allocation_ratio)


@dataclass(frozen=True)
class ToppHeapDispatchAlg(DispatchAlg):
    """Largest area first, to that of the least loaded ``top_p`` share of ranks which shares most keys with the chunk.

    A share of less than two ranks, such as 0, is the least loaded rank alone, as in `MinHeapDispatchAlg`.
    """

    top_p: float = 0.0
    type: ClassVar[DispatchAlgType] = DispatchAlgType.TOPP_HEAP

    def __post_init__(self) -> None:
        _check_share("top_p", self.top_p)


@dataclass(frozen=True)
class LBDispatchAlg(DispatchAlg):
    """A lower bound on the largest area. It assigns nothing: planning with it is a ValueError that names what does."""

    type: ClassVar[DispatchAlgType] = DispatchAlgType.LOWER_BOUND


@dataclass(frozen=True)
class DPDispatchAlg(DispatchAlg):
    """The best balance there is, by search over subsets: for a dozen chunks at most; beyond, a ValueError names what else to use."""

    type: ClassVar[DispatchAlgType] = DispatchAlgType.DYNAMIC_PROGRAMMING


@dataclass(frozen=True)
class BSDispatchAlg(DispatchAlg):
    """Binary search for the smallest capacity that first-fit decreasing fills."""

    type: ClassVar[DispatchAlgType] = DispatchAlgType.BINARY_SEARCH


@dataclass(frozen=True)
class AffinityDispatchAlg(DispatchAlg):
    """Chunks that share keys stay together: few rows sent and received, areas within a few percent of balance.

    The assignment of the least predicted step (see `OverlapConfig` for the costs) among one with that slack, min-heap's, and one as
    balanced as min-heap's: never predicted slower than `MinHeapDispatchAlg`.
    """

    type: ClassVar[DispatchAlgType] = DispatchAlgType.AFFINITY


@dataclass(frozen=True)
class DispatchConfig:
    """How the sequence is cut and dealt.

    Attributes:
        chunk_size: tokens of a chunk. None: chosen from the areas of chunks, at most
            ``ceil(total_seqlen_q / (MIN_CHUNKS_PER_RANK * cp_size))``, and exactly that for algorithms other than the default one.
        uneven_shard: pad nothing; ranks may then hold different numbers of rows.
        alg: how chunks are dealt.
    """

    chunk_size: int | None = None
    uneven_shard: bool = False
    alg: DispatchAlg = field(default_factory=AffinityDispatchAlg)

    def __post_init__(self) -> None:
        _check_alg(self.alg, DispatchAlg, "MinHeapDispatchAlg()")
        _check_type("uneven_shard", self.uneven_shard, bool, "True or False")
        if self.chunk_size is not None:
            _check_positive("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class OverlapAlg:
    """How remote rows are dealt to stages. Use one of the classes below; ``type`` is its name."""

    type: ClassVar[OverlapAlgType]


@dataclass(frozen=True)
class UniformOverlapAlg(OverlapAlg):
    """Every stage asks the same of every link. The two fields are kept for callers and change nothing."""

    random_costs: bool = False
    random_seed: int | None = None
    type: ClassVar[OverlapAlgType] = OverlapAlgType.UNIFORM


@dataclass(frozen=True)
class GreedyOverlapAlg(OverlapAlg):
    """Rows that most work waits for travel first."""

    type: ClassVar[OverlapAlgType] = OverlapAlgType.GREEDY


@dataclass(frozen=True)
class OverlapConfig:
    """How moving keys and values is hidden behind computing.

    Attributes:
        enable: False is one remote stage, whatever ``mode`` and ``degree`` say.
        mode: STATIC takes ``degree``; DYNAMIC chooses the number of stages by predicted time, and ignores a ``degree`` of 1 or more.
        degree: remote stages; None only where it is ignored. 0 is MagiAttention's way to switch overlap off: the config becomes
            ``enable=False, degree=1``.
        dynamic_max_degree: the most stages that DYNAMIC tries; None is 8.
        min_chunk_size: rows; the busiest rank's stages are no smaller, so short sequences get fewer stages.
        max_num_chunks: into how many parts a rank's remote rows are cut at most when DYNAMIC or greedy dealing looks at them.
        alg: how remote rows are dealt to stages.
        calc_cost_factor: time to compute one attended cell forward, all heads, in any unit.
        comm_cost_factor: time to receive one row of keys and values, all heads, in the same unit.
        latency_cost: time of an exchange, whatever it carries, in the same unit.

    Times decide how chunks are dealt (`AffinityDispatchAlg`) and how many stages there are (DYNAMIC). Left at 1, 1 and 0, they are those
    of a current GPU for the key's heads in two bytes an element; `measure_cost_factors` measures yours.
    """

    enable: bool = True
    mode: AttnOverlapMode = AttnOverlapMode.STATIC
    degree: int | None = 1
    dynamic_max_degree: int | None = 8
    min_chunk_size: int = 512
    max_num_chunks: int = 64
    alg: OverlapAlg = field(default_factory=UniformOverlapAlg)
    calc_cost_factor: float = 1.0
    comm_cost_factor: float = 1.0
    latency_cost: float = 0.0

    def __post_init__(self) -> None:
        if type(self.degree) is int and self.degree == 0:
            object.__setattr__(self, "enable", False)
            object.__setattr__(self, "degree", 1)
        _check_type("enable", self.enable, bool, "True or False")
        _check_type("mode", self.mode, AttnOverlapMode, "AttnOverlapMode.STATIC or AttnOverlapMode.DYNAMIC")
        _check_alg(self.alg, OverlapAlg, "UniformOverlapAlg()")
        for name in ("min_chunk_size", "max_num_chunks"):
            _check_positive(name, getattr(self, name))
        for name in ("degree", "dynamic_max_degree"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.enable and self.mode is AttnOverlapMode.STATIC and self.degree is None:
            raise ValueError(
                "degree must be a positive int under AttnOverlapMode.STATIC, got None; have it chosen by AttnOverlapMode.DYNAMIC, or set "
                "enable=False for one stage"
            )
        for name in ("calc_cost_factor", "comm_cost_factor"):
            factor = getattr(self, name)
            if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
                raise ValueError(f"{name} must be a positive number, got {factor!r}")
        if not isinstance(self.latency_cost, (int, float)) or not 0 <= self.latency_cost < math.inf:
            raise ValueError(f"latency_cost must be 0 or a positive number, got {self.latency_cost!r}")

    @property
    def no_overlap(self) -> bool:
        """Whether moving is not hidden behind computing: one remote stage, as ``enable=False`` or ``degree=0`` ask."""
        return not self.enable


@dataclass(frozen=True)
class GrpCollConfig:
    """Settings of another library's native collectives. Accepted so that programs run unchanged, and unused."""

    num_sms: int = 24
    nvl_chunk_size: int = 8
    nvl_buffer_size: int = 256
    rdma_chunk_size: int = 16
    rdma_buffer_size: int = 128
    num_nvl_bytes: int = int(2e9)
    num_rdma_bytes: int = 0


@dataclass(frozen=True)
class DistAttnConfig:
    """All settings of distributed attention.

    Attributes:
        dispatch_config: how the sequence is cut and dealt to ranks.
        overlap_config: how moving is hidden behind computing.
        grpcoll_config: accepted and unused.
    """

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)
    grpcoll_config: GrpCollConfig = field(default_factory=GrpCollConfig)

    def __post_init__(self) -> None:
        _check_type("dispatch_config", self.dispatch_config, DispatchConfig, "a DispatchConfig")
        _check_type("overlap_config", self.overlap_config, OverlapConfig, "an OverlapConfig")
        _check_type("grpcoll_config", self.grpcoll_config, GrpCollConfig, "a GrpCollConfig")


def _check_type(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_alg(alg: object, kind: type, example: str) -> None:
    # The base class itself is no algorithm, and neither is an algorithm's class without its brackets.
    _check_type("alg", alg, kind, f"an algorithm such as {example}")
    if type(alg) is kind:
        raise ValueError(f"alg must be one of the classes derived from {kind.__name__}, such as {example}, got {alg!r}")


def _check_share(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share, in [0, 1], got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
