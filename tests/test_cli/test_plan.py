"""``magi-attention plan``: what it prints, writes and chooses, and what it says to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest

from magi_attention.cli import main, masks, values
from magi_attention.mask import AttnMask
from magi_attention.plan.report import PlanReport

SMALL = ["plan", "--mask", "varlen-causal", "--tokens", "16K", "--mean-length", "2000", "--ranks", "4"]


def mask_of(*words: str) -> AttnMask:
    parser = ArgumentParser()
    masks.add_arguments(parser)
    return masks.mask_of(parser.parse_args(words))


@pytest.mark.parametrize("name", masks.NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_masks_by_name(name: str, packed: bool, tmp_path: Path) -> None:
    lengths = [5, 1, 12, 6] if packed else [24]
    (tmp_path / "lengths").write_text(" ".join(map(str, lengths)))
    mask = mask_of("--mask", name, "--lengths", str(tmp_path / "lengths"), "--window", "3", "--block", "4")
    document = np.repeat(np.arange(len(lengths)), lengths)
    at = np.concatenate([np.arange(length) for length in lengths])
    behind = at[:, None] - at[None, :]
    allowed = {
        "full": behind > -24,
        "causal": behind >= 0,
        "window": (behind >= 0) & (behind <= 3),
        "block-causal": at[:, None] // 4 >= at[None, :] // 4,
    }[name.removeprefix("varlen-")]
    np.testing.assert_array_equal(mask.to_dense(), allowed & (document[:, None] == document[None, :]))


def test_lengths_are_cut_to_the_tokens(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("5, 7\n9")
    assert mask_of("--mask", "varlen-full", "--lengths", str(file), "--tokens", "10").area == 25 + 25
    assert mask_of("--mask", "varlen-full", "--lengths", str(file)).num_q == 21
    assert masks.log_normal_lengths(1 << 20, 15_000, 0).sum() == 1 << 20


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (values.count, "1M", 1 << 20),
        (values.count, "8k", 8192),
        (values.count, "77", 77),
        (values.rate, "400T", 400e12),
        (values.rate, "4.5e9", 4.5e9),
        (values.seconds, "30us", 30e-6),
        (values.seconds, "0", 0.0),
        (values.heads, "32:8", (32, 8)),
        (values.heads, "16", (16, 16)),
        (values.mesh, "8x4", (8, 4)),
        (values.degree, "auto", None),
        (values.degree, "3", 3),
    ],
)
def test_values(parse: object, text: str, value: object) -> None:
    assert callable(parse)
    assert parse(text) == pytest.approx(value) if isinstance(value, float) else parse(text) == value


@pytest.mark.parametrize(
    "words",
    [
        ["--tokens", "0"],
        ["--tokens", "1.5M"],
        ["--flops", "0"],
        ["--latency", "-3"],
        ["--bandwidth", "4 apples"],
        ["--heads", "9:2"],
        ["--mesh", "8"],
        ["--degree", "0"],
        ["--dispatcher", "minheap"],
    ],
)
def test_misspelt_values(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*SMALL, *words])
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--mask", "causal", "--ranks", "4"], "--tokens says how long"),
        (["--mask", "causal", "--tokens", "1K"], "how many ranks"),
        (["--mask", "causal", "--tokens", "1K", "--ranks", "4", "--mesh", "2x4"], "8 ranks, --ranks says 4"),
        (["--mask", "causal", "--tokens", "1K", "--ranks", "2", "--dispatcher", "lower-bound"], "use BSDispatchAlg"),
        (["--mask", "causal", "--tokens", "1K", "--ranks", "2", "--lengths", "not-there"], "not-there"),
        (["--mask", "causal", "--tokens", "1K", "--ranks", "2", "--bandwidth-between", "1G"], "say --mesh 8x8 too"),
    ],
)
def test_what_cannot_be(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_lengths_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lengths"
    file.write_bytes(b"\xff\xfe\x00")
    assert main(["plan", "--mask", "varlen-full", "--ranks", "2", "--lengths", str(file)]) == 2
    message = capsys.readouterr().err
    assert "positive ints" in message and str(file) in message


def test_crossing_once_or_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--mask",
        "causal",
        "--tokens",
        "16K",
        "--mesh",
        "2x4",
        "--bandwidth-between",
        "1G",
        "--chunk-size",
        "256",
    ]
    rows = {}
    for crossing in ("once", "each"):
        assert main([*words, "--crossing", crossing, "--json", str(tmp_path / crossing)]) == 0
        rows[crossing] = json.loads((tmp_path / crossing).read_text())["report"]["rows_between_nodes"]
    assert 0 < rows["once"] < rows["each"]
    capsys.readouterr()
    assert main([*words, "--compare", "--json", str(tmp_path / "both")]) == 0
    both = json.loads((tmp_path / "both").read_text())
    assert {one["once"] for one in both["compared"]} == {True, False}
    assert both["chosen"]["once"]
    assert "rows crossing between nodes once" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "5 x", "3 0", "4 5"])
def test_bad_lengths(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lengths"
    file.write_text(text)
    assert main(["plan", "--mask", "varlen-full", "--tokens", "10", "--ranks", "2", "--lengths", str(file)]) == 2
    expected = "fewer than the 10" if text == "4 5" else "positive ints"
    assert expected in capsys.readouterr().err


def test_prints_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main([*SMALL, "--chunk-size", "256", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    result = PlanReport.from_json(json.dumps(written["report"]))
    assert result.num_ranks == 4 and result.rows_in_excess == 0
    assert str(result) in printed
    assert written["chosen"]["chunk_size"] == 256


def test_mesh_counts_what_crosses(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = ["plan", "--mask", "full", "--tokens", "2K", "--mesh", "2x2", "--chunk-size", "512", "--json", str(file)]
    assert main(words) == 0
    result = json.loads(file.read_text())["report"]
    # Each node needs the other's 1,024 rows, once; each rank the 1,536 rows that it does not hold.
    assert result["rows_between_nodes"] == 2 * 1024
    assert result["rows_received"] == [1536] * 4


@pytest.mark.parametrize("words", [["--compare"], ["--sweep"], ["--compare", "--sweep"]])
def test_chooses_the_least_predicted_step(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main([*SMALL, *words, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    steps = [one["step"] for one in written["compared"]]
    assert written["chosen"]["step"] == min(steps) == written["report"]["step"]
    assert len(steps) == {"--compare": 6, "--sweep": 16}.get("".join(words), 6 * 16)
    printed = capsys.readouterr().out
    assert f"choice: {written['chosen']['dispatcher']}" in printed
    assert "why: " in printed


def test_sweep_at_a_latency_that_forbids_stages(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main([*SMALL, "--sweep", "--latency", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["report"]["forward_stages"] == written["report"]["backward_stages"] == 1


def test_module_and_broken_pipe() -> None:
    command = [sys.executable, "-m", "magi_attention", *SMALL]
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rows received" in whole.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
