"""What the planner makes of its own accord: no chunk size given, from 1M tokens on 64 ranks to 16M on 1,024.

``python benchmarks/plan.py --auto --beside DIR/src``: the same cases by another version of this package, in one run, each in a process of
its own (for its memory), the two versions in turns. DIR is a checkout: ``git worktree add DIR REVISION``.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magi_attention.config import DispatchConfig, DistAttnConfig, MinHeapDispatchAlg
from magi_attention.mask import AttnMask, causal, varlen, varlen_block_causal
from magi_attention.plan import build_plan
from plan import document_lengths  # type: ignore[import-not-found]

SRC = Path(__file__).parent.parent / "src"
WORLDS = [(1 << 20, 64), (1 << 22, 256), (1 << 23, 512), (1 << 24, 1024)]
MEAN_LENGTH, BLOCK, WINDOW = 4096, 2048, 1024
MASKS = ("packed", "packed by blocks", "windowed", "causal")


@dataclass(frozen=True)
class Case:
    """One mask over one world."""

    mask: str
    total: int
    num_ranks: int
    seed: int

    def make(self) -> AttnMask:
        if self.mask == "causal":
            return causal(self.total)
        borders = np.append(0, np.cumsum(document_lengths(self.total, MEAN_LENGTH, self.seed))).tolist()
        if self.mask == "packed by blocks":
            return varlen_block_causal(borders, BLOCK)
        if self.mask == "windowed":
            return varlen(borders, window_size=(WINDOW, 0))
        return varlen(borders, causal=True)


def cases(quick: bool, seeds: int) -> Iterator[Case]:
    for total, num_ranks in WORLDS[:2] if quick else WORLDS:
        for mask in MASKS:
            for seed in range(1 if mask == "causal" else seeds):
                yield Case(mask, total, num_ranks, seed)


def plan_one(case: Case) -> dict[str, Any]:
    """Plan a case, as a process of its own does: the figures of the plan, and the CPU time and memory that it took."""
    mask = case.make()
    start = time.process_time()
    plan = build_plan(mask, case.num_ranks)
    plan.rank(case.num_ranks // 2)
    milliseconds = (time.process_time() - start) * 1e3
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "chunk": plan.q_layout.chunk_size,
        "rows": int(plan.received_rows.sum()),
        "imbalance": plan.imbalance,
        "step_ms": plan.report().step * 1e3,
        "cpu_ms": milliseconds,
        "memory_mib": memory,
    }


def in_a_process(case: Case, source: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parent)])}
    command = [sys.executable, __file__, case.mask, str(case.total), str(case.num_ranks), str(case.seed)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(quick: bool, seeds: int, beside: Path | None, table: Path) -> None:
    """Print a line a case, and write the table; what was made by the other version is after the slash."""
    print(
        "\nChunk size omitted: packed documents of 4,096 tokens on average (lognormal), causal; by blocks of 2,048; windowed, 1,024; one "
        "causal document.\nImbalance is the largest area over the mean; step is predicted; CPU and memory are of planning, one rank's part "
        "included." + ("" if beside is None else " After the slash: the other version.")
    )
    print(
        f"{'mask':<17}{'tokens':>11}{'ranks':>6}{'seed':>5} {'chunk':>13} {'rows, M':>18} {'imbalance':>13} {'step ms':>19} "
        f"{'CPU ms':>15} {'MiB':>12}"
    )
    rows = []
    for case in cases(quick, seeds):
        versions = [SRC] if beside is None else [SRC, beside]
        found = [in_a_process(case, source) for source in versions]
        rows.append(
            {**vars(case), **found[0], **{f"beside_{k}": v for k, v in (found[1] if found[1:] else {}).items()}}
        )

        def pair(name: str, show: str, scale: float = 1.0, found: list[dict[str, Any]] = found) -> str:
            return " / ".join(format(one[name] / scale, show) for one in found)

        print(
            f"{case.mask:<17}{case.total:>11,}{case.num_ranks:>6}{case.seed:>5} {pair('chunk', ','):>13} "
            f"{pair('rows', ',.3f', 1e6):>18} {pair('imbalance', '.3f'):>13} {pair('step_ms', ',.2f'):>19} "
            f"{pair('cpu_ms', ',.0f'):>15} {pair('memory_mib', ',.0f'):>12}",
            flush=True,
        )
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"table: {table}")
    summarise(rows)


def plot_sizes(picture: Path, total: int = 1 << 20, num_ranks: int = 64, seed: int = 0) -> None:
    """What each chunk size would give for packed documents: largest chunk, balance that min-heap reaches, rows, predicted step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from magi_attention.plan.chunk_size import chunk_sizes  # not at the top: versions beside this one need not have it
    from magi_attention.plan.dispatch import chunk_areas

    mask = Case("packed", total, num_ranks, seed).make()
    chosen = build_plan(mask, num_ranks).q_layout.chunk_size
    sizes = list(chunk_sizes(total, num_ranks, 8))
    largest, reachable, imbalance, rows, steps = [], [], [], [], []
    for size in sizes:
        plan = build_plan(mask, num_ranks, DistAttnConfig(DispatchConfig(chunk_size=size)))
        heap = build_plan(mask, num_ranks, DistAttnConfig(DispatchConfig(chunk_size=size, alg=MinHeapDispatchAlg())))
        largest.append(chunk_areas(mask.bands, plan.q_layout.chunk_edges).max() * num_ranks / mask.area)
        reachable.append(heap.imbalance)
        imbalance.append(plan.imbalance)
        rows.append(plan.received_rows.sum() / 1e6)
        steps.append(plan.report().step * 1e3)
    figure, (areas, moved) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    areas.plot(sizes, largest, marker="o", label="largest chunk")
    areas.plot(sizes, reachable, marker="s", label="busiest rank, min-heap")
    areas.plot(sizes, imbalance, marker="^", label="busiest rank, plan")
    areas.set_ylabel("area over a rank's mean area")
    areas.set_ylim(0)
    moved.plot(sizes, steps, marker="o", color="C3", label="predicted step, ms")
    twin = moved.twinx()
    twin.plot(sizes, rows, marker="s", color="C4", label="rows received, millions")
    moved.set_ylabel("predicted step, ms")
    twin.set_ylabel("rows received, millions")
    moved.set_ylim(0)
    twin.set_ylim(0)
    for axes in (areas, moved):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("tokens a chunk")
        axes.axvline(chosen, color="grey", linestyle=":", label="chosen")
        axes.grid(alpha=0.3)
    areas.legend()
    handles = [*moved.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    moved.legend(handles=handles, loc="lower right")
    figure.suptitle(f"Packed causal documents, {total:,} tokens on {num_ranks} ranks")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    print(f"plot: {picture}")


def summarise(rows: list[dict[str, Any]]) -> None:
    print(f"\nlargest imbalance {max(row['imbalance'] for row in rows):.3f}")
    if "beside_rows" not in rows[0]:
        return
    print(
        f"{'mask':<17} {'cases':>5} {'rows':>21} {'predicted step':>21} {'CPU':>21}   ratios to the other version: least, median, most"
    )
    for mask in dict.fromkeys(row["mask"] for row in rows):
        mine = [row for row in rows if row["mask"] == mask]
        columns = []
        for name in ("rows", "step_ms", "cpu_ms"):
            ratios = sorted(row[name] / row[f"beside_{name}"] for row in mine)
            columns.append(f"{ratios[0]:>6.3f} {ratios[len(ratios) // 2]:>6.3f} {ratios[-1]:>6.3f}")
        print(f"{mask:<17} {len(mine):>5} " + " ".join(f"{column:>21}" for column in columns))


if __name__ == "__main__":
    name, total, num_ranks, seed = sys.argv[1:]
    print(json.dumps(plan_one(Case(name, int(total), int(num_ranks), int(seed)))))
