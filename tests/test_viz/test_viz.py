"""Pictures of plans: every cell at the rank and stage that computes it, and a page that says so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magi_attention.cli import main
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import area, check_disjoint, to_dense
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.demand import BEGIN, DST, END, STAGE
from magi_attention.plan.query_moves import RowBytes
from magi_attention.viz import plan_to_string, planned_pieces, plot_plan, write_page

DRIVER = Path(__file__).parent / "page_driver.js"

MASKS = {
    "causal": AttnMask.causal(96),
    "varlen": AttnMask.varlen([0, 10, 11, 60, 96], causal=True),
    "block_causal": AttnMask.varlen_block_causal([0, 40, 96], 16),
    "prefix": AttnMask.shared_prefix([30, 20, 20, 26], [-1, 0, 0, 0]),
    "window": AttnMask.sliding_window(96, (20, 5)),
}


def plan_of(name: str, num_stages: int = 1, num_ranks: int = 4) -> AttnPlan:
    config = DistAttnConfig(overlap_config=OverlapConfig(degree=num_stages, min_chunk_size=1))
    return build_plan(MASKS[name], num_ranks, config)


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_pieces_are_the_mask_by_rank_and_stage(name: str, num_stages: int) -> None:
    plan = plan_of(name, num_stages)
    pieces = planned_pieces(plan)
    check_disjoint(pieces.bands)
    n = plan.mask.num_q
    np.testing.assert_array_equal(to_dense(pieces.bands, n, n) > 0, plan.mask.to_dense())
    for rank in range(plan.num_ranks):
        own = plan.q_layout.positions(rank)
        keys = plan.k_layout.positions(rank)
        for stage in range(plan.num_stages + 1):
            bands = pieces.bands[(pieces.rank == rank) & (pieces.stage == stage)]
            queries = np.zeros(n, bool)
            queries[own[own < n]] = True
            seen = to_dense(bands, n, n) > 0
            if stage:
                arriving = plan.forward.table[
                    (plan.forward.table[:, DST] == rank) & (plan.forward.table[:, STAGE] == stage - 1)
                ]
                keys = np.concatenate([np.arange(begin, end) for begin, end in arriving[:, [BEGIN, END]]] or [own[:0]])
            has_key = np.zeros(n, bool)
            has_key[keys[keys < n]] = True
            np.testing.assert_array_equal(seen, plan.mask.to_dense() & queries[:, None] & has_key[None, :])
            part = plan.rank(rank)
            local = part.stages[stage - 1].bands if stage else part.host_bands
            assert area(bands).sum() == area(local).sum()


def test_moved_queries_are_drawn_where_they_are_computed() -> None:
    mask = AttnMask.from_slices([(248, 256)], [(0, 256)], "causal")
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=4))
    plan = build_plan(mask, 4, config, moves_queries=RowBytes.of(num_heads_q=4, num_heads_kv=1, head_dim=64))
    assert plan.moved is not None, "this mask has to make queries move, or the test says nothing"
    pieces = planned_pieces(plan)
    assert (pieces.stage == -1).any()
    np.testing.assert_array_equal(to_dense(pieces.bands, 256, 256) > 0, mask.to_dense())
    areas = np.bincount(pieces.rank, weights=area(pieces.bands), minlength=4)
    np.testing.assert_array_equal(areas, plan.areas)


def test_pictures_of_plans(tmp_path: Path) -> None:
    plan = plan_of("varlen", 2)
    for color_by in ("rank", "stage", "slice", "type"):
        plot_plan(plan, tmp_path / f"{color_by}.png", color_by=color_by)
        assert (tmp_path / f"{color_by}.png").stat().st_size > 1000
    with pytest.raises(ValueError, match='must be "rank"'):
        plot_plan(plan, color_by="colour")


def test_terminal_drawing_names_the_ranks() -> None:
    plan = build_plan(AttnMask.causal(8), 2)
    lines = plan_to_string(plan).splitlines()[2:-1]
    owner = [int(rank) for rank in plan.q_layout.locate(np.arange(8))[0]]
    assert lines == ["│" + str(owner[i]) * (i + 1) + " " * (7 - i) + "│" for i in range(8)]


def act(page: Path, actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node, which runs the page's script, is not installed")
    done = subprocess.run([node, DRIVER, page], input=json.dumps(actions), capture_output=True, text=True, check=True)
    said: list[dict[str, Any]] = json.loads(done.stdout)
    return said


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    write_page(plan_of("causal"), tmp_path / "plan.html", title="<b> & </script>")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?:|@import", page)
    assert "{{" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "&lt;b&gt; &amp; &lt;/script&gt;" in page


def test_hovering_over_a_page(tmp_path: Path) -> None:
    plan = plan_of("varlen", 2)
    write_page(plan, tmp_path / "plan.html")
    cells = np.random.default_rng(0).integers(0, 96, (60, 2)).tolist()
    lengths = [96, 96]
    said = act(
        tmp_path / "plan.html",
        [{"id": "mask", "kind": "mousemove", "cell": cell, "lengths": lengths} for cell in cells],
    )
    dense = plan.mask.to_dense()
    for (q, k), one in zip(cells, said, strict=True):
        assert one["under"].startswith(f"query {q}, key {k}")
        assert ("not attended" in one["under"]) == (not dense[q, k])
        if dense[q, k]:
            assert f"rank {plan.q_layout.locate(np.array([q]))[0][0]}, " in one["under"]


def test_stepping_through_a_page(tmp_path: Path) -> None:
    plan = plan_of("block_causal", 2)
    write_page(plan, tmp_path / "plan.html")
    pieces = planned_pieces(plan)
    press = {"id": "next", "kind": "click"}
    rank = {"id": "rank", "kind": "change", "value": "2"}
    own, first, second, of_rank = act(tmp_path / "plan.html", [press, press, press, rank])
    rows = plan.forward.table[:, END] - plan.forward.table[:, BEGIN]
    for stage, one in enumerate((own, first, second)):
        cells = int(area(pieces.bands[pieces.stage == stage]).sum())
        assert f"{cells:,} cells are computed" in one["step"]
        if stage:
            assert f"{int(rows[plan.forward.table[:, STAGE] == stage - 1].sum()):,} keys arrive" in one["step"]
        shown = sum(fill["colour"] != "#ececec" for fill in one["filled"])
        assert shown == int((pieces.stage == stage).sum())
    mine = (pieces.stage == 2) & (pieces.rank == 2)
    assert f"{int(area(pieces.bands[mine]).sum()):,} cells are computed" in of_rank["step"]
    assert sum(fill["colour"] != "#ececec" for fill in of_rank["filled"]) == int(mine.sum())


def test_going_closer_and_moving_on_a_page(tmp_path: Path) -> None:
    plan = plan_of("varlen", 2)
    write_page(plan, tmp_path / "plan.html")
    on = {"id": "mask", "cell": [70, 65], "lengths": [96, 96]}
    hover, closer = {**on, "kind": "mousemove"}, {**on, "kind": "wheel", "delta": -200}
    drag = [
        {**on, "kind": "mousedown"},
        {**on, "kind": "mousemove", "cell": [60, 60]},
        {"id": "window", "kind": "mouseup"},
    ]
    said = act(
        tmp_path / "plan.html",
        [*[closer, hover] * 12, *drag, {**hover, "cell": [60, 60]}, {"id": "whole", "kind": "click"}, hover],
    )
    for one in said[1:24:2]:  # what is under the pointer stays there
        assert one["under"].startswith("query 70, key 65")
    # Closest are 4 x 4 cells: the key under the pointer, and where it lies, tell which. Stairs lie on the edges of cells.
    closest = said[22]
    assert re.findall(r"\d+", closest["keys"]) == ["63", "64", "65", "66", "67"]
    assert re.findall(r"\d+", closest["queries"]) == ["68", "69", "70", "71", "72"]
    first_key, first_query = 65.5 - 4 * 65.5 / 96, 70.5 - 4 * 70.5 / 96
    corners = np.array([corner for fill in closest["filled"] for corner in fill["path"]]) / closest["size"] * 4
    at = corners + np.array([first_key, first_query])
    np.testing.assert_allclose(at, at.round(), atol=1e-6)
    assert len(at) < sum(len(fill["path"]) for fill in said[28]["filled"])
    assert said[27]["under"] == said[23]["under"]  # the cell came along with the pointer
    assert said[28]["keys"].endswith("<span>96</span>")
    assert said[29]["under"].startswith("query 70, key 65")
    assert len(said[28]["filled"]) == len(planned_pieces(plan).bands)


@pytest.mark.parametrize("output", ["mask.png", "mask.svg", "plan.html", None])
def test_show(output: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["show", "--mask", "varlen-block-causal", "--tokens", "64K", "--ranks", "4"]
    assert main([*asked, *(["-o", str(tmp_path / output)] if output else [])]) == 0
    printed = capsys.readouterr().out
    assert (str(tmp_path / output) if output else "AttnPlan: 65,536 queries") in printed
    assert output is None or (tmp_path / output).stat().st_size > 1000


def test_show_without_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["show", "--mask", "window", "--tokens", "1000"]
    assert main(asked) == 0
    assert "AttnMask: 1,000 queries" in capsys.readouterr().out
    assert main([*asked, "-o", str(tmp_path / "plan.html")]) == 2
    assert "--ranks says" in capsys.readouterr().err
    assert main([*asked, "--color-by", "type"]) == 2
    assert main([*asked, "-o", str(tmp_path / "mask.nothing")]) == 2


def test_show_a_mask_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = AttnMask.shared_prefix([3, 2, 4], [-1, 0, 0])
    (tmp_path / "mask.json").write_text(mask.to_json(), encoding="utf-8")
    assert main(["show", "--mask", str(tmp_path / "mask.json")]) == 0
    *drawn, how_to_read = capsys.readouterr().out.splitlines()
    assert "\n".join(drawn) == mask.to_string()
    assert how_to_read.startswith("queries downwards, keys to the right; a character is one cell: █ all attended")
    assert main(["show", "--mask", str(tmp_path / "nothing.json")]) == 2
    with pytest.raises(SystemExit):
        main(["show", "--mask", "casual", "--tokens", "8"])
    assert "expected one of full, causal" in capsys.readouterr().err
