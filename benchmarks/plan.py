"""What the planner promises, measured: ``python benchmarks/plan.py``.

Prints planning times, rows moved, balance and predicted step of the default dispatcher beside min-heap's, what keys cost end to end, what
moving queries saves, and the predicted efficiency for 8 to 1,024 ranks (also as a picture). Planning is one thread's work, and its times
are processor times, which others on the machine disturb least. ``--quick`` leaves the largest worlds out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import AttnMask
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Heads
from magi_attention.plan.query_moves import RowBytes
from magi_attention.plan.report import report

K, M = 1024, 1 << 20


def document_lengths(total: int, mean: float = 15_000, seed: int = 0) -> list[int]:
    """Log-normal lengths (sigma 1) that fill ``total`` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(int(rng.lognormal(np.log(mean) - 0.5, 1.0)) + 1, total - sum(lengths)))
    return lengths


def documents(total: int, seed: int = 0) -> AttnMask:
    """Packed causal documents."""
    ends = np.cumsum(document_lengths(total, seed=seed))
    starts = np.append(0, ends[:-1])
    zero = np.zeros_like(starts)
    return AttnMask(np.stack([starts, ends, starts, ends, starts - ends + 1, zero], axis=1), total, total)


def block_documents(total: int, seed: int = 0, block: int = 2048) -> AttnMask:
    """Packed documents, each causal by blocks of 2,048."""
    q_ranges, k_ranges, start = [], [], 0
    for length in document_lengths(total, seed=seed):
        for at in range(0, length, block):
            q_ranges.append((start + at, start + min(at + block, length)))
            k_ranges.append((start, start + min(at + block, length)))
        start += length
    return AttnMask.from_slices(q_ranges, k_ranges, "full", total, total)


def causal(total: int, seed: int = 0) -> AttnMask:
    """One causal document, whatever the seed."""
    return AttnMask.from_slices([(0, total)], [(0, total)], "causal", total, total)


def suffix_over_prefix(total: int, suffix: int = 1024) -> AttnMask:
    """Only the last tokens ask, and they see all before them."""
    return AttnMask.from_slices([(total - suffix, total)], [(0, total)], "causal", total, total)


def timed_plan(
    mask: AttnMask,
    num_ranks: int,
    chunk_size: int,
    alg: DispatchAlg,
    repeats: int,
    overlap: OverlapConfig = OverlapConfig(),  # noqa: B008 - a frozen value
) -> tuple[AttnPlan, float]:
    """The plan, and the best of a few times (s) to make it and one rank's part of it."""
    config = DistAttnConfig(DispatchConfig(chunk_size=chunk_size, alg=alg), overlap)
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        plan = build_plan(mask, num_ranks, config)
        plan.rank(num_ranks // 2)
        best = min(best, time.process_time() - start)
    return plan, best


def compare_dispatchers(quick: bool, seeds: int) -> None:
    print(
        "\nDispatch, chunks of 512. Ratios are to min-heap: rows received in all and by the busiest rank; rows on the busiest link, sent "
        "or received; predicted step.\nImbalance is the largest area over the mean; time is all of planning, for one rank."
    )
    print(
        f"{'mask':<26}{'tokens':>10}{'ranks':>6}{'seed':>5} {'heap ms':>8} {'ours ms':>8} {'rows':>6} {'busiest':>8} {'link':>6} "
        f"{'step':>6} {'imbalance':>10} {'heap':>6}"
    )
    cases: list[tuple[str, Callable[[int, int], AttnMask], int, int]] = [
        ("causal", causal, 256 * K, 4),
        ("documents", documents, M, 64),
        ("documents, blocks of 2048", block_documents, M, 64),
        ("causal", causal, M, 64),
    ]
    if not quick:
        cases += [("documents", documents, 4 * M, 512), ("documents, blocks of 2048", block_documents, 4 * M, 512)]
    for name, make, total, num_ranks in cases:
        for seed in range(1 if make is causal else seeds):
            mask, repeats = make(total, seed), 3 if total <= M else 1
            heap, heap_time = timed_plan(mask, num_ranks, 512, MinHeapDispatchAlg(), repeats)
            ours, ours_time = timed_plan(mask, num_ranks, 512, AffinityDispatchAlg(), repeats)
            assert len(set(ours.q_layout.num_rows.tolist())) == 1, "equal tokens on every rank"
            rows = ours.received_rows.sum() / max(heap.received_rows.sum(), 1)
            busiest = ours.received_rows.max() / max(heap.received_rows.max(), 1)
            links = [int(max(plan.received_rows.max(), plan.sent_rows.max())) for plan in (ours, heap)]
            steps = [report(plan).step for plan in (ours, heap)]
            print(
                f"{name:<26}{total:>10,}{num_ranks:>6}{seed:>5} {heap_time * 1e3:>8.1f} {ours_time * 1e3:>8.1f} {rows:>6.3f} "
                f"{busiest:>8.3f} {links[0] / max(links[1], 1):>6.3f} {steps[0] / steps[1]:>6.3f} {ours.imbalance:>10.3f} "
                f"{heap.imbalance:>6.3f}"
            )


def time_keys(quick: bool) -> None:
    """What a program waits for where every micro-batch has a mask of its own: `magi_attn_flex_key` and this rank's part of the plan."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from magi_attention.api import magi_attn_flex_key, plan_of

    print(
        "\nKeys, end to end: ranges to the plan of one rank, packed causal documents, best of five new masks; and the same key again"
    )
    print(f"{'tokens':>10}{'ranks':>6} {'documents of':>13} {'chunk':>8} {'new ms':>7} {'again ms':>9}")
    cases = [(256 * K, 4, 15_000), (M, 64, 15_000), (M, 64, 300)] + ([] if quick else [(8 * M, 1024, 15_000)])
    for total, num_ranks, mean in cases:
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
        for chunk_size in (None, 512):
            times = []
            for seed in range(5):
                ends = np.append(0, np.cumsum(document_lengths(total, mean, seed))).tolist()
                ranges = [[start, end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
                for _ in range(2):
                    start_time = time.process_time()
                    key = magi_attn_flex_key(ranges, ranges, "causal", total, total, 32, 8, 128, chunk_size=chunk_size)
                    plan_of(key).rank(0)
                    times.append(time.process_time() - start_time)
            new, again = min(times[::2]) * 1e3, min(times[1::2]) * 1e3
            print(f"{total:>10,}{num_ranks:>6} {mean:>13,} {chunk_size or 'default':>8} {new:>7.1f} {again:>9.2f}")
        dist.destroy_process_group()


def step_bytes(plan: AttnPlan, row_bytes: RowBytes) -> int:
    """What all ranks receive in a step, forward and backward."""
    return int(plan.received_rows.sum()) * row_bytes.key + int(plan.received_queries.sum()) * row_bytes.query


def move_queries(heads: Heads) -> None:
    print(
        "\nLooking for queries to move (MAGI_ATTENTION_QO_COMM=1): planning beside planning without, as many heads of keys as given"
    )
    print(
        f"{'mask':<12}{'tokens':>10}{'ranks':>6}{'chunk':>7} {'kv heads':>9} {'without ms':>11} {'with ms':>8} {'bytes':>7}"
    )
    for name, mask, num_ranks in (
        ("causal", causal(M), 64),
        ("documents", documents(M), 64),
        ("documents", documents(4 * M), 512),
    ):
        for num_heads_kv in (heads.num_heads_kv, heads.num_heads_q):
            row_bytes = RowBytes.of(heads.num_heads_q, num_heads_kv, heads.head_dim, heads.itemsize)
            config = DistAttnConfig(DispatchConfig(chunk_size=512))
            times, moved = [], []
            for moves in (None, row_bytes):
                start = time.process_time()
                plan = build_plan(mask, num_ranks, config, moves_queries=moves)
                plan.rank(num_ranks // 2)
                times.append(time.process_time() - start)
                moved.append(step_bytes(plan, row_bytes))
            print(
                f"{name:<12}{mask.num_q:>10,}{num_ranks:>6}{512:>7} {num_heads_kv:>9} {times[0] * 1e3:>11.0f} {times[1] * 1e3:>8.0f} "
                f"{moved[1] / moved[0]:>7.3f}"
            )
    print("\nMoving queries: the last 1,024 of 1,048,576 tokens attend all before them, 64 ranks, chunks of 256")
    mask = suffix_over_prefix(M)
    row_bytes = RowBytes.of(heads.num_heads_q, heads.num_heads_kv, heads.head_dim, heads.itemsize)
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=256))
    keys, queries = (build_plan(mask, 64, config, moves_queries=moves) for moves in (None, row_bytes))
    received = [step_bytes(plan, row_bytes) for plan in (keys, queries)]
    for name, plan, moved in zip(("keys move", "queries may"), (keys, queries), received, strict=True):
        print(
            f"{name:<12} rows of keys {int(plan.received_rows.sum()):>12,}  of queries {int(plan.received_queries.sum()):>9,}  "
            f"{moved / 2**20:>10,.1f} MiB a step, area imbalance {plan.imbalance:.3f}"
        )
    print(f"bytes received, queries moving over keys moving: {received[1] / received[0]:.4f}")


def predict_efficiency(heads: Heads, quick: bool, picture: Path) -> None:
    print(
        "\nPredicted efficiency (ideal time / predicted step): 8,192 tokens a rank, packed documents, chunks of 1,024, stages chosen"
    )
    names = ["ours", "ring", "all-gather", "head-sharded (Ulysses)"]
    print(f"{'ranks':>6} " + " ".join(f"{name:>23}" for name in names) + f" {'plan ms':>9}")
    worlds = [8, 16, 32, 64, 128] + ([] if quick else [256, 512, 1024])
    table = []
    for num_ranks in worlds:
        overlap = OverlapConfig(mode=AttnOverlapMode.DYNAMIC)
        plan, seconds = timed_plan(documents(num_ranks * 8192), num_ranks, 1024, AffinityDispatchAlg(), 1, overlap)
        result = report(plan, heads)
        ideal = result.efficiency * result.step
        row = [result.efficiency] + [np.nan if one.step is None else ideal / one.step for one in result.alternatives]
        table.append(row)
        shown = ["not possible" if np.isnan(share) else f"{share:.1%}" for share in row]
        print(f"{num_ranks:>6} " + " ".join(f"{share:>23}" for share in shown) + f" {seconds * 1e3:>9.0f}")
    plot_efficiency(worlds, names, table, picture)


def plot_efficiency(worlds: list[int], names: list[str], table: list[list[float]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for at, name in enumerate(names):
        axes.plot(worlds, [row[at] * 100 for row in table], marker="o", label=name, linewidth=2.5 if at == 0 else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(worlds, [str(n) for n in worlds])
    axes.set_ylim(0, 105)
    axes.set_xlabel("ranks, 8,192 tokens each")
    axes.set_ylabel("predicted efficiency, %")
    axes.set_title("Packed documents, causal, forward + backward")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    print(f"plot: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the largest worlds out")
    parser.add_argument("--plot", type=Path, default=Path("out/plan_efficiency.png"))
    parser.add_argument("--seeds", type=int, default=1, help="how many sets of documents (1)")
    parser.add_argument("--auto", action="store_true", help="only what is planned where no chunk size is given")
    parser.add_argument(
        "--beside", type=Path, help="with --auto: the src folder of another version, compared in the same run"
    )
    parser.add_argument(
        "--table", type=Path, default=Path("out/plan_auto.csv"), help="with --auto: where its table goes"
    )
    args = parser.parse_args()
    if args.auto:
        from auto_chunks import compare, plot_sizes  # which take their documents from here

        plot_sizes(args.plot.with_name("chunk_size.png"))
        compare(args.quick, args.seeds, args.beside, args.table)
        return
    heads = Heads()
    compare_dispatchers(args.quick, args.seeds)
    time_keys(args.quick)
    move_queries(heads)
    predict_efficiency(heads, args.quick, args.plot)


if __name__ == "__main__":
    main()
