"""The GPU kernels through the compiler, without a GPU: every entry of the table compiles, fits, and spills no more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magi_attention.kernels.ahead_of_time import AotVariant
from magi_attention.testing.ahead_of_time import ARCHITECTURES, SHARED_LIMIT, Code, complaints, matrix_instruction
from magi_attention.testing.machine_code import unwritten_uniform_registers

pytest.importorskip("triton")

import triton

from magi_attention.kernels.triton.configs import padded

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"


def run_compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: here kernels are interpreted, which leaves nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def compile_report(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of the report."""
    rows = tmp_path / "rows.json"
    done = run_compiling(str(REPORT), "--json", str(rows), *options)
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
    assert len(rows) >= 81
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
    for error, words in (({"swizzles": (64, 128)}, "64, 128 bytes"), ({"unwritten": ("UR22",)}, "written: UR22")):
        assert words in complaints(_variant(), "sm_90", replace(good, **error))[0]
    assert complaints(_variant(), "sm_90", replace(good, swizzles=(128,), continued_sums=1)) == []
    assert "term by term" in complaints(_variant(uses_matrix_units=False), "sm_90", replace(good, continued_sums=1))[0]


def test_rows_that_products_read_from_shared_memory_have_128_bytes() -> None:
    for arch in ("sm_90", "sm_100", "sm_103"):
        assert [padded(d, 2, arch) for d in (1, 24, 40, 64, 65, 256)] == [64, 64, 64, 64, 128, 256]
        assert [padded(d, 4, arch) for d in (1, 24, 40)] == [32, 32, 64]
    for arch in ("sm_80", "sm_120", "gfx942", "interpreter"):
        assert [padded(d, 2, arch) for d in (1, 24, 40, 65)] == [16, 32, 64, 128]


# Of a forward for sm_90 whose keys and values ptxas confused: it took UR22 for the lower half of the values' descriptors, UR50.
_MISCOMPILED = """
\t\tFunction : forward_kernel
        /*0040*/                   ULDC.64 UR20, c[0x0][0x208] ;
        /*0070*/                   LDG.E R7, desc[UR20][R2.64] ;
        /*1760*/                   R2UR UR7, R7 ;
        /*18d0*/                   UIADD3 UR9, UR7, 0x4000, URZ ;
        /*18f0*/                   UIADD3 UR22, UP0, UR22, 0x40, URZ ;
        /*1910*/                   USHF.R.U32.HI UR9, URZ, 0x4, UR9 ;
        /*1930*/                   UIADD3.X UR23, UR23, -0x7fffffe0, URZ, UP0, !UPT ;
        /*1970*/                   USGXT.U32 UR50, UR9, 0xe ;
        /*1b20*/                   UMOV UR51, 0x40000040 ;
        /*1b30*/              @UP1 UIADD3.64 UR26, UR22, 0x40, URZ ;
        /*1b40*/                   HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR48].tnspB, R88 ;
"""


def test_unwritten_uniform_registers_are_seen() -> None:
    assert unwritten_uniform_registers(_MISCOMPILED) == ("UR22", "UR23")
    right = _MISCOMPILED.replace("UR22, UP0, UR22", "UR22, UP0, UR50").replace("UR23, UR23", "UR23, UR51")
    assert unwritten_uniform_registers(right) == ("UR50", "UR51"), "written too late"
    lines = right.splitlines()
    late = [line for line in lines if "USGXT" in line or "UMOV" in line]
    right = "\n".join([*lines[:2], *late, *(line for line in lines[2:] if line not in late)])
    assert unwritten_uniform_registers(right) == ("UR9",)
    right = right.replace("USGXT.U32 UR50, UR9", "USGXT.U32 UR50, URZ")
    assert unwritten_uniform_registers(right) == ()
    left_side_in_shared_memory = right.replace("R88, R24, gdesc", "R88, gdesc")
    assert unwritten_uniform_registers(left_side_in_shared_memory) == ("UR48", "UR49")
    assert unwritten_uniform_registers(right + right.replace("ULDC.64", "ULDC")) == ("UR21",), "another function begins"


def test_operands_that_the_compiler_confuses_are_seen() -> None:
    """Values in blocks of 32 columns beside keys in 64: swizzled by 64 and by 128 bytes."""
    program = """if True:
        from dataclasses import replace
        from magi_attention.kernels.triton.variants import aot_variants
        from magi_attention.testing.ahead_of_time import compile_variant

        wanted = ("forward", (40, 24), "merge unaligned")
        variant = next(one for one in aot_variants("sm_90") if (one.kernel, one.head_dims, one.case) == wanted)
        code = compile_variant(replace(variant, constexprs={**variant.constexprs, "BLOCK_DV": 32}), "sm_90")
        print(code.swizzles, code.unwritten)
    """
    done = run_compiling("-c", program)
    assert done.stdout.startswith("(64, 128)"), done.stdout + done.stderr
    if triton.__version__.startswith("3.6."):  # a later compiler may be right
        assert "UR" in done.stdout, done.stdout
