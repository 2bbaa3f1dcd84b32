"""How attention is spread over ranks. All values here are frozen, hashable, and checked when made.

No field changes what is computed: outputs and gradients are those of the mask, up to the rounding of another order of summation.
What each changes is balance, bytes moved, and how much of the moving is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from magi_attention.common.enum import AttnOverlapMode, DispatchAlgType, OverlapAlgType


@dataclass(frozen=True)
class DispatchAlg:
    """How chunks are dealt to ranks. Use one of the classes below."""

    @property
    def type(self) -> DispatchAlgType:
        """The algorithm's name."""
        raise NotImplementedError


def _named(name: DispatchAlgType) -> Any:
    return property(lambda self: name, doc="The algorithm's name.")


@dataclass(frozen=True)
class MinHeapDispatchAlg(DispatchAlg):
    """Largest area first, each to the least loaded rank. Balances best for its cost; knows nothing of what must move."""

    type = _named(DispatchAlgType.MIN_HEAP)


@dataclass(frozen=True)
class SequentialDispatchAlg(DispatchAlg):
    """Chunks in order. What a side that is not permutable gets."""

    type = _named(DispatchAlgType.SEQUENTIAL_DISPATCH)


@dataclass(frozen=True)
class SortedSequentialSelectAlg(DispatchAlg):
    """Chunks by falling area, dealt in turn, forwards and backwards."""

    type = _named(DispatchAlgType.SORTED_SEQUENTIAL_SELECT)


@dataclass(frozen=True)
class ToppHeapDispatchAlg(DispatchAlg):
    """Largest area first, to that of the least loaded ``top_p`` share of ranks which shares most keys with the chunk."""

    top_p: float = 0.5
    type = _named(DispatchAlgType.TOPP_HEAP)

    def __post_init__(self) -> None:
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p must be a share of the ranks, in [0, 1], got {self.top_p}")


@dataclass(frozen=True)
class LBDispatchAlg(DispatchAlg):
    """A lower bound on the largest area. It assigns nothing: planning with it is a ValueError that names what does."""

    type = _named(DispatchAlgType.LOWER_BOUND)


@dataclass(frozen=True)
class DPDispatchAlg(DispatchAlg):
    """The best balance there is, by search over subsets: for a dozen chunks at most; beyond, a ValueError names what else to use."""

    type = _named(DispatchAlgType.DYNAMIC_PROGRAMMING)


@dataclass(frozen=True)
class BSDispatchAlg(DispatchAlg):
    """Binary search for the smallest capacity that first-fit decreasing fills."""

    type = _named(DispatchAlgType.BINARY_SEARCH)


@dataclass(frozen=True)
class AffinityDispatchAlg(DispatchAlg):
    """Among assignments within a few percent of balance, few rows received: chunks that share keys stay together."""

    type = _named(DispatchAlgType.AFFINITY)


@dataclass(frozen=True)
class DispatchConfig:
    """How the sequence is cut and dealt.

    Attributes:
        chunk_size: tokens of a chunk; None is ``ceil(total_seqlen_q / (MIN_CHUNKS_PER_RANK * cp_size))``.
        uneven_shard: pad nothing; ranks may then hold different numbers of rows.
        alg: how chunks are dealt.
    """

    chunk_size: int | None = None
    uneven_shard: bool = False
    alg: DispatchAlg = field(default_factory=AffinityDispatchAlg)

    def __post_init__(self) -> None:
        _check_type("alg", self.alg, DispatchAlg, "an algorithm such as MinHeapDispatchAlg()")
        if self.chunk_size is not None:
            _check_positive("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class OverlapAlg:
    """How remote rows are dealt to stages. Use one of the classes below."""

    @property
    def type(self) -> OverlapAlgType:
        """The algorithm's name."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniformOverlapAlg(OverlapAlg):
    """Every stage asks the same of every link. The two fields are kept for callers and change nothing."""

    random_costs: bool = False
    random_seed: int = 42
    type = property(lambda self: OverlapAlgType.UNIFORM, doc="The algorithm's name.")


@dataclass(frozen=True)
class GreedyOverlapAlg(OverlapAlg):
    """Rows that most work waits for travel first. The two fields are kept for callers and change nothing."""

    random_costs: bool = False
    random_seed: int = 42
    type = property(lambda self: OverlapAlgType.GREEDY, doc="The algorithm's name.")


@dataclass(frozen=True)
class OverlapConfig:
    """How moving keys and values is hidden behind computing.

    Attributes:
        enable: False is one remote stage.
        mode: STATIC takes ``degree``; DYNAMIC chooses the number of stages by predicted time.
        degree: remote stages, at least 1; with None, DYNAMIC is meant.
        dynamic_max_degree: the most stages that DYNAMIC tries; None is 8.
        min_chunk_size: rows; the busiest rank's stages are no smaller, so short sequences get fewer stages.
        max_num_chunks: into how many parts a rank's remote rows are cut at most when DYNAMIC or greedy dealing looks at them.
        alg: how remote rows are dealt to stages.
        calc_cost_factor: time to compute one attended cell, in any unit.
        comm_cost_factor: time to receive one row of keys and values, in the same unit.
        latency_cost: time of an exchange, whatever it carries, in the same unit.
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
        _check_type("mode", self.mode, AttnOverlapMode, "AttnOverlapMode.STATIC or AttnOverlapMode.DYNAMIC")
        _check_type("alg", self.alg, OverlapAlg, "UniformOverlapAlg() or GreedyOverlapAlg()")
        for name in ("degree", "dynamic_max_degree"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.degree is None and self.mode is AttnOverlapMode.STATIC:
            raise ValueError(
                "degree must be a positive int under AttnOverlapMode.STATIC, got None; give it, or use DYNAMIC"
            )
        for name in ("min_chunk_size", "max_num_chunks"):
            _check_positive(name, getattr(self, name))
        for name in ("calc_cost_factor", "comm_cost_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.latency_cost >= 0:
            raise ValueError(f"latency_cost must be 0 or positive, got {self.latency_cost}")


@dataclass(frozen=True)
class GrpCollConfig:
    """Settings of another library's native collectives. Accepted so that programs run unchanged, and unused."""

    num_sms: int = 24
    nvl_chunk_size: int = 8
    nvl_buffer_size: int = 256
    rdma_chunk_size: int = 4
    rdma_buffer_size: int = 128
    num_nvl_bytes: int = int(2e9)
    num_rdma_bytes: int = 0


@dataclass(frozen=True)
class DistAttnConfig:
    """All settings of distributed attention. ``grpcoll_config`` is accepted and unused."""

    dispatch_config: DispatchConfig = field(default_factory=DispatchConfig)
    overlap_config: OverlapConfig = field(default_factory=OverlapConfig)
    grpcoll_config: GrpCollConfig = field(default_factory=GrpCollConfig)

    def __post_init__(self) -> None:
        _check_type("dispatch_config", self.dispatch_config, DispatchConfig, "a DispatchConfig")
        _check_type("overlap_config", self.overlap_config, OverlapConfig, "an OverlapConfig")


def _check_type(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
