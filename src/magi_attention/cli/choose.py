"""Plans of one mask under different settings, side by side, and which of them is predicted fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
)
from magi_attention.mask import AttnMask
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Heads, Machine
from magi_attention.plan.query_moves import RowBytes
from magi_attention.plan.report import PlanReport

DISPATCHERS: dict[str, Callable[[], DispatchAlg]] = {
    "affinity": AffinityDispatchAlg,
    "min-heap": MinHeapDispatchAlg,
    "sequential": SequentialDispatchAlg,
    "sorted-sequential": SortedSequentialSelectAlg,
    "top-p-heap": partial(ToppHeapDispatchAlg, top_p=0.5),
    "binary-search": BSDispatchAlg,
    "dynamic-programming": DPDispatchAlg,
    "lower-bound": LBDispatchAlg,
}
# Those that serve any number of chunks.
COMPARED = ("affinity", "min-heap", "sequential", "sorted-sequential", "top-p-heap", "binary-search")


@dataclass(frozen=True)
class Job:
    """What is planned, for whom, on what. ``ranks_per_node``: of a mesh; None where there is none."""

    mask: AttnMask
    num_ranks: int
    ranks_per_node: int | None
    heads: Heads
    machine: Machine
    moves_queries: bool


@dataclass(frozen=True)
class Setting:
    """What may be chosen. ``chunk_size`` None: the default for the length. ``degree`` None: chosen by predicted time. ``once``: on a mesh,
    a row that several ranks of a node need crosses to it once, and is handed on there."""

    dispatcher: str
    chunk_size: int | None
    degree: int | None
    once: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """A setting's plan and certificate. ``seconds``: what planning took, for one rank."""

    setting: Setting
    plan: AttnPlan
    report: PlanReport
    seconds: float

    @property
    def rank_order(self) -> tuple[float, int, int, int]:
        """Least predicted step; among equals the fewer stages, then the fewer rows, then the larger chunks: less to handle."""
        return (
            self.report.step,
            self.report.forward_stages + self.report.backward_stages,
            sum(self.report.rows_received),
            -self.plan.q_layout.chunk_size,
        )


def config_of(job: Job, setting: Setting) -> DistAttnConfig:
    """The settings as the library takes them, with the machine's costs in them."""
    heads = job.heads
    cost = job.machine.cost_model(heads.num_heads_q, heads.num_heads_kv, heads.head_dim, heads.itemsize)
    overlap = OverlapConfig(
        mode=AttnOverlapMode.DYNAMIC if setting.degree is None else AttnOverlapMode.STATIC,
        degree=setting.degree,
        calc_cost_factor=cost.cell,
        comm_cost_factor=cost.row,
        latency_cost=cost.latency,
    )
    dispatch = DispatchConfig(chunk_size=setting.chunk_size, alg=DISPATCHERS[setting.dispatcher]())
    return DistAttnConfig(dispatch_config=dispatch, overlap_config=overlap)


def try_setting(job: Job, setting: Setting) -> Outcome:
    """Plan, and report."""
    heads = job.heads
    row_bytes = RowBytes.of(heads.num_heads_q, heads.num_heads_kv, heads.head_dim, heads.itemsize)
    start = time.perf_counter()
    plan = build_plan(
        job.mask,
        job.num_ranks,
        config_of(job, setting),
        moves_queries=row_bytes,
        only_few_queries=not job.moves_queries,  # as a program does that does not ask for it
        heads=heads,
        ranks_per_node=job.ranks_per_node if setting.once else None,
    )
    plan.rank(0)
    seconds = time.perf_counter() - start
    return Outcome(setting, plan, plan.report(job.heads, job.machine), seconds)


def settings_of_sweep(job: Job, dispatcher: str) -> list[Setting]:
    """Chunks of 256 to 8,192 tokens, at least two a rank, by one, two, four and a chosen number of stages."""
    most = job.mask.num_q // (2 * job.num_ranks)
    sizes: list[int | None] = [size for size in (256, 512, 1024, 2048, 4096, 8192) if size <= most]
    return [Setting(dispatcher, size, degree) for size in sizes or [None] for degree in (1, 2, 4, None)]


def best_of_each(outcomes: list[Outcome]) -> list[Outcome]:
    """The best of every dispatcher."""
    names = dict.fromkeys(one.setting.dispatcher for one in outcomes)
    return [
        min((one for one in outcomes if one.setting.dispatcher == name), key=lambda one: one.rank_order)
        for name in names
    ]


def side_by_side(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for every outcome, and above them what their columns are."""
    lines = [
        f"{'dispatcher':<19} {'chunks of':>9} {'degree':>6} {'fw+bw stages':>12} {'imbalance':>9} {'rows received':>14} {'busiest':>11} "
        f"{'between nodes':>14} {'peak MiB':>8} {'step ms':>9} {'of ideal':>8} {'plan ms':>8}"
    ]
    for one in outcomes:
        result = one.report
        between = (
            f"{result.rows_between_nodes:,}{' once' if one.setting.once else ''}" if result.rows_between_nodes else "-"
        )
        degree = "auto" if one.setting.degree is None else str(one.setting.degree)
        lines.append(
            f"{one.setting.dispatcher:<19} {one.plan.q_layout.chunk_size:>9,} {degree:>6} "
            f"{f'{result.forward_stages} + {result.backward_stages}':>12} {result.imbalance:>9.3f} {sum(result.rows_received):>14,} "
            f"{max(result.rows_received):>11,} {between:>14} {max(result.peak_bytes) / 2**20:>8.0f} {result.step * 1e3:>9.2f} "
            f"{result.efficiency:>8.1%} {one.seconds * 1e3:>8.0f}"
        )
    return lines


def choose(outcomes: list[Outcome]) -> tuple[Outcome, list[str]]:
    """The outcome of the least predicted step, and why it is that: in words, for a person."""
    best, *others = sorted(outcomes, key=lambda one: one.rank_order)
    result, setting = best.report, best.setting
    degree = "chosen by prediction" if setting.degree is None else str(setting.degree)
    lines = [
        f"choice: {setting.dispatcher}, chunks of {best.plan.q_layout.chunk_size:,}, degree {degree} "
        f"({result.forward_stages} remote stages forward, {result.backward_stages} backward)"
        + (", rows crossing between nodes once" if setting.once else "")
        + f": predicted step {result.step * 1e3:.2f} ms"
    ]
    if others:
        worst = others[-1].report.step
        equal = sum(one.report.step <= result.step * 1.001 for one in others)
        lines.append(
            f"why: the least predicted step of {len(outcomes)}; the slowest takes {worst / result.step:.2f} times as long"
            + (
                f"; {equal} more are within 0.1%: of equal ones, this has the fewest stages, then moves the fewest rows"
                if equal
                else ""
            )
        )
    return best, [*lines, _what_bounds(result)]


def _what_bounds(result: PlanReport) -> str:
    """Where the time of a step goes: computing evenly spread, imbalance, and waiting."""
    if not result.step:
        return "nothing is attended: there is nothing to wait for"
    balanced = result.efficiency
    uneven = balanced * (result.imbalance - 1)
    waiting = max(1 - balanced - uneven, 0.0)
    return (
        f"of that step {balanced:.1%} is computing, were it evenly spread; up to {uneven:.1%} is the largest rank's surplus; the rest, "
        f"{waiting:.1%}, is waiting for rows"
    )
