"""Pictures of what a plan costs: loads, who sends to whom, and the timeline. Needs matplotlib, imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import Ints
from magi_attention.mask.draw import hue_to_rgb
from magi_attention.plan import AttnPlan
from magi_attention.plan.demand import BEGIN, DST, END, SRC
from magi_attention.plan.report import PlanReport
from magi_attention.viz.plot import plot_plan

_AREA, _RECEIVED, _SENT, _WAIT = "#4c78a8", "#f58518", "#54a24b", "#e3e6ea"
_HOST = "#9aa5b1"
# Up to this many ranks a field of the matrix has room for its number, and a timeline for every rank.
_MOST_RANKS_WRITTEN = 8
_MOST_RANKS_IN_TIMELINE = 64


def save_pictures(plan: AttnPlan, report: PlanReport, folder: str | Path) -> list[Path]:
    """Write the pictures of a plan to ``folder`` as PNG: the mask by rank, loads, traffic, timeline.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in ("mask", "loads", "traffic", "timeline")]
    plot_plan(plan, paths[0])
    plot_loads(report, paths[1])
    plot_traffic(plan, paths[2])
    plot_timeline(report, paths[3])
    return paths


def plot_loads(report: PlanReport, path: str | Path | None = None) -> Any:
    """The matplotlib figure of area, and of rows received and sent, by rank; written to ``path`` unless that is None."""
    figure = _figure(9, 5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    rank = np.arange(report.num_ranks)
    area = np.array(report.area, np.float64)
    _bars(upper, rank, area, 0.0, 0.8, _AREA, None)
    upper.axhline(area.mean(), color="black", linewidth=0.9, linestyle="--", label="mean")
    upper.set_ylabel("cells computed")
    upper.set_title(f"area: largest rank {report.imbalance:.3f} of the mean", fontsize=10, loc="left")
    _bars(lower, rank, np.array(report.rows_received), -0.2, 0.4, _RECEIVED, "rows received")
    _bars(lower, rank, np.array(report.rows_sent), 0.2, 0.4, _SENT, "rows sent")
    lower.set_ylabel("k rows")
    lower.set_xlabel("rank")
    received = sum(report.rows_received)
    lower.set_title(
        f"rows of keys: {received:,} in all, {max(report.rows_received):,} to one rank", fontsize=10, loc="left"
    )
    for axes in (upper, lower):
        axes.set_xlim(-0.6, report.num_ranks - 0.4)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12 or 1)
        axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        _plain_numbers(axes.yaxis)
    _whole_numbers(lower.xaxis, report.num_ranks)
    return _written(figure, path)


def plot_traffic(plan: AttnPlan, path: str | Path | None = None) -> Any:
    """The matplotlib figure of how many k rows each rank (down) receives from each other (across) in a forward pass.

    Rows count from their owner, also where they travel by way of another rank of a node; white fields are 0.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    counts = traffic(plan)
    figure = _figure(6.6, 5.6)
    axes = figure.add_subplot()
    most = max(int(counts.max(initial=0)), 2)
    shown = np.ma.masked_equal(counts, 0)
    least = int(counts[counts > 0].min(initial=most)) if counts.any() else 1
    image = axes.imshow(shown, cmap="viridis", norm=LogNorm(min(least, most // 2), most), interpolation="nearest")
    axes.set(xlabel="from rank", ylabel="to rank")
    share = 100 * np.count_nonzero(counts) / max(plan.num_ranks * (plan.num_ranks - 1), 1)
    axes.set_title(
        f"{int(counts.sum()):,} k rows received; {share:.0f}% of pairs exchange any", fontsize=10, loc="left"
    )
    if plan.num_ranks <= _MOST_RANKS_WRITTEN:
        for (to, source), number in np.ndenumerate(counts):
            if number:
                bright = np.log(number / least) > 0.6 * np.log(most / least)
                axes.text(
                    source,
                    to,
                    f"{number:,}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if bright else "white",
                )
    if plan.ranks_per_node is not None:
        for edge in range(plan.ranks_per_node, plan.num_ranks, plan.ranks_per_node):
            axes.axhline(edge - 0.5, color="black", linewidth=0.5)
            axes.axvline(edge - 0.5, color="black", linewidth=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        _whole_numbers(axis, plan.num_ranks)
    bar = figure.colorbar(image, ax=axes, label="k rows").ax
    bar.minorticks_off()
    bar.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain_numbers(bar.yaxis)
    return _written(figure, path)


def traffic(plan: AttnPlan) -> Ints:
    """``[num_ranks, num_ranks]`` int64: k rows that rank ``i`` receives of those that rank ``j`` holds, in a forward pass."""
    table = plan.forward.table
    counts = np.zeros((plan.num_ranks, plan.num_ranks), np.int64)
    np.add.at(counts, (table[:, DST], table[:, SRC]), table[:, END] - table[:, BEGIN])
    return counts


def plot_timeline(report: PlanReport, path: str | Path | None = None) -> Any:
    """The matplotlib figure of the predicted forward pass: what each rank computes, and above it, thinner, what it receives.

    Of more than 64 ranks, the 64 that finish last.
    """
    marks = np.array(report.stage_timeline)  # [num_ranks, 2 + 3 * num_stages]
    order = np.arange(len(marks))
    if len(marks) > _MOST_RANKS_IN_TIMELINE:
        order = np.sort(np.argsort(-marks[:, -1], kind="stable")[:_MOST_RANKS_IN_TIMELINE])
    marks = marks[order] * 1e3
    num_stages = (marks.shape[1] - 2) // 3
    figure = _figure(9, 1.6 + 0.5 * len(marks) if len(marks) <= 8 else 4.8 + len(marks) / 16)
    axes = figure.add_subplot()
    at = np.arange(len(marks))
    axes.barh(at + 0.16, marks[:, -1], height=0.56, color=_WAIT, label="waiting")
    axes.barh(at + 0.16, marks[:, 1], height=0.56, color=_HOST, label="own keys")
    posted = np.zeros(len(marks))
    for stage in range(num_stages):
        arrived, begin, done = marks[:, 2 + 3 * stage : 5 + 3 * stage].T
        colour = hue_to_rgb((0.58 + 0.15 * stage) % 1, 0.5)
        axes.barh(at + 0.16, done - begin, left=begin, height=0.56, color=colour, label=f"stage {stage + 1}")
        axes.barh(at - 0.28, arrived - posted, left=posted, height=0.2, color=colour, alpha=0.75)
        posted = begin
    axes.axvline(report.forward * 1e3, color="black", linewidth=0.9, linestyle="--")
    axes.set(xlabel="ms; thin bars: rows on their way", ylabel="rank", xlim=(0, max(report.forward * 1.02e3, 1e-9)))
    axes.set_ylim(len(marks) - 0.4, -0.6)
    _rank_names(axes.yaxis, order)
    axes.spines[["top", "right"]].set_visible(False)
    some = (
        "" if len(order) == report.num_ranks else f" (the {len(order)} of {report.num_ranks:,} ranks that finish last)"
    )
    without = report.forward_without_overlap * 1e3
    axes.set_title(
        f"forward, predicted: {report.forward * 1e3:.2f} ms, without overlap {without:.2f} ms{some}",
        fontsize=10,
        loc="left",
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=10, fontsize=8, frameon=False)
    return _written(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "magi_attention[plot]"') from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(axes: Any, rank: Ints, values: NDArray[Any], by: float, width: float, colour: str, label: str | None) -> None:
    """Bars; where there are too many to tell apart, one filled outline, which is the same picture and drawn at once."""
    if len(rank) <= 128:
        axes.bar(rank + by, values, width, color=colour, label=label)
    else:
        axes.stairs(values, np.arange(len(rank) + 1) - 0.5, color=colour, fill=by <= 0, label=label)


def _whole_numbers(axis: Any, num_ranks: int) -> None:
    step = 1 if num_ranks <= 16 else 1 << max(num_ranks // 8 - 1, 1).bit_length()
    axis.set_ticks(np.arange(0, num_ranks, step))


def _rank_names(axis: Any, order: Ints) -> None:
    step = 1 if len(order) <= 16 else 4
    axis.set_ticks(np.arange(0, len(order), step), [str(rank) for rank in order[::step]])


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _written(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        figure.savefig(path)
    return figure
