"""The GPU kernels through the compiler, without a GPU: every entry of the table compiles, fits, and spills no more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magi_attention.kernels.ahead_of_time import AotVariant
from magi_attention.testing.ahead_of_time import ARCHITECTURES, SHARED_LIMIT, Code, complaints, matrix_instruction

pytest.importorskip("triton")

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"


def compile_report(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of the report, made in a process of its own: here kernels are interpreted, which leaves nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(REPORT), "--json", str(rows), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert rows.exists(), done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    assert done.returncode == min(100, sum(bool(row["complaints"]) for row in found)), done.stderr
    return found


def assert_as_the_table_says(rows: list[dict[str, Any]]) -> None:
    wrong = [
        f"{row['kernel']} {row['arch']} {row['head_dims']} {row['dtype']} {row['case']}: {'; '.join(row['complaints'])}"
        for row in rows
        if row["complaints"]
    ]
    assert not wrong, "\n".join(wrong)


def test_what_stands_for_all(tmp_path: Path) -> None:
    rows = compile_report(tmp_path, "--quick")
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    assert {row["kernel"] for row in rows} >= {"forward", "dkdv", "dq"}
    assert_as_the_table_says(rows)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_entry_of_the_table(tmp_path: Path, arch: str) -> None:
    rows = compile_report(tmp_path, "--arch", arch)
    assert len(rows) >= 45
    assert_as_the_table_says(rows)


def _variant(**options: Any) -> AotVariant:
    return AotVariant("forward", (128, 128), "bf16", "plain", None, {}, {}, **options)


def test_what_is_complained_of() -> None:
    good = Code(registers=255, spilled=0, shared=SHARED_LIMIT["sm_90"], matrix_instructions=1)
    assert complaints(_variant(), "sm_90", good) == []
    spilling = Code(registers=255, spilled=24, shared=0, matrix_instructions=1)
    assert "24 bytes" in complaints(_variant(), "sm_90", spilling)[0]
    assert complaints(_variant(most_spilled=24), "sm_90", spilling) == []
    for arch in ARCHITECTURES:
        too_large = Code(registers=1, spilled=0, shared=SHARED_LIMIT[arch] + 1, matrix_instructions=1)
        assert str(SHARED_LIMIT[arch]) in complaints(_variant(), arch, too_large)[0]
        idle = Code(registers=1, spilled=0, shared=0, matrix_instructions=0)
        assert matrix_instruction(arch) in complaints(_variant(), arch, idle)[0]
        assert complaints(_variant(uses_matrix_units=False), arch, idle) == []
    assert "at once" in complaints(_variant(keeps_products_in_flight=True), "sm_90", good)[0]
