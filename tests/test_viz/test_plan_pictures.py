"""Pictures of what a plan costs show the report's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask, causal
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.cost import Machine
from magi_attention.viz.plan_pictures import plot_loads, plot_timeline, plot_traffic, save_pictures, traffic

# A row takes long enough that ranks wait.
MACHINE = Machine(flops=1e12, bandwidth=1e9, latency=1e-6)


def plan_of(num_ranks: int, *, degree: int = 2, per_node: int | None = None) -> AttnPlan:
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=16), overlap_config=OverlapConfig(degree=degree, min_chunk_size=1)
    )
    return build_plan(causal(64 * num_ranks), num_ranks, config, ranks_per_node=per_node)


def test_traffic_adds_up() -> None:
    plan = plan_of(6)
    counts = traffic(plan)
    np.testing.assert_array_equal(counts.sum(axis=1), plan.received_rows)
    np.testing.assert_array_equal(counts.sum(axis=0), plan.sent_rows)
    assert not counts.diagonal().any()


@pytest.mark.parametrize("per_node", [None, 2])
def test_matrix_shows_the_traffic(per_node: int | None) -> None:
    plan = plan_of(4, per_node=per_node)
    axes = plot_traffic(plan).axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), 0)
    np.testing.assert_array_equal(shown, traffic(plan))
    written = {(t.get_position()[1], t.get_position()[0]): int(t.get_text().replace(",", "")) for t in axes.texts}
    assert written == {at: count for at, count in np.ndenumerate(traffic(plan)) if count}
    assert len(axes.lines) == (0 if per_node is None else 2)


def test_loads_show_the_report() -> None:
    report = plan_of(4).report(machine=MACHINE)
    upper, lower = plot_loads(report).axes
    assert [bar.get_height() for bar in upper.patches] == report.area
    assert [bar.get_height() for bar in lower.patches] == report.rows_received + report.rows_sent


@pytest.mark.parametrize("degree", [1, 3])
def test_timeline_shows_the_report(degree: int) -> None:
    report = plan_of(4, degree=degree).report(machine=MACHINE)
    axes = plot_timeline(report).axes[0]
    waiting, own, *pairs = (
        [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars.patches] for bars in axes.containers
    )
    marks = np.array(report.stage_timeline) * 1e3
    np.testing.assert_allclose(np.array(own)[:, 1], marks[:, 1])
    np.testing.assert_allclose(np.array(waiting)[:, 1], marks[:, -1])
    assert len(pairs) == 2 * degree
    for stage in range(degree):
        computing, moving = np.array(pairs[2 * stage]), np.array(pairs[2 * stage + 1])
        np.testing.assert_allclose(computing, marks[:, 3 + 3 * stage : 5 + 3 * stage], atol=1e-12)
        np.testing.assert_allclose(moving[:, 1], marks[:, 2 + 3 * stage])


def test_all_are_written(tmp_path: Path) -> None:
    plan = plan_of(4)
    paths = save_pictures(plan, plan.report(machine=MACHINE), tmp_path / "pictures")
    assert [path.name for path in paths] == ["mask.png", "loads.png", "traffic.png", "timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_timeline_of_many_ranks_shows_the_last_to_finish() -> None:
    report = plan_of(130).report(machine=MACHINE)
    axes = plot_timeline(report).axes[0]
    ends = [bar.get_width() for bar in axes.containers[0].patches]
    assert sorted(ends) == sorted(marks[-1] * 1e3 for marks in report.stage_timeline)[-64:]


def test_a_mask_that_attends_nothing() -> None:
    plan = build_plan(AttnMask(np.empty((0, 6), np.int64), 32, 32), 2)
    report = plan.report()
    for figure in (plot_loads(report), plot_traffic(plan), plot_timeline(report)):
        figure.canvas.draw()
