"""What the compiler makes of every GPU kernel, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python benchmarks/compile_report.py                          everything: many minutes
    python benchmarks/compile_report.py --quick                  what stands for all: about a minute
    python benchmarks/compile_report.py --arch sm_90 gfx942 --kernel dkdv --dtype bf16

The exit status is the number of kernels that are not as they should be: that do not compile, spill more than the table of tiles says, take
more shared memory than there is, leave the matrix units idle, read registers that nothing has written, or add up less exactly than they
could.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from magi_attention.testing.ahead_of_time import ARCHITECTURES, BACKENDS, matrix_instruction, report, variants_of

_COLUMNS = ("kernel", "arch", "head_dim", "dtype", "case", "warps", "registers", "spilled", "shared KiB", "matrix")
_WIDTHS = (10, 7, 8, 5, 15, 5, 9, 7, 10, 12)


def main() -> int:
    """Prints the table; returns how many rows have complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", help="forward, dkdv, dq, ...; left out, all")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16", "fp32"), help="left out, all")
    parser.add_argument("--quick", action="store_true", help="only what stands for all")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    rows = []
    print(_line(_COLUMNS))
    for backend in args.backend:
        for arch in args.arch:
            for variant in variants_of(backend, arch):
                wanted = (not args.kernel or variant.kernel in args.kernel) and (
                    not args.dtype or variant.dtype in args.dtype
                )
                if wanted and (variant.is_representative or not args.quick):
                    rows.append({"backend": backend, **report(variant, arch)})
                    print(_line(_cells(rows[-1])), *rows[-1]["complaints"], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(row["complaints"]) for row in rows)
    print(f"{len(rows)} kernels, {wrong} not as they should be")
    return wrong


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    name = row["kernel"] if row["backend"] == "triton" else f"{row['backend']} {row['kernel']}"
    head = (name, row["arch"], row["head_dims"], row["dtype"], row["case"], row["options"].get("num_warps", ""))
    if "registers" not in row:
        return (*head, "-", "-", "-", "-")
    matrix = f"{row['matrix_instructions']} {matrix_instruction(row['arch'])}"
    return (*head, row["registers"], row["spilled"], f"{row['shared'] / 1024:.0f}", matrix)


def _line(cells: tuple[object, ...]) -> str:
    return " ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


if __name__ == "__main__":
    raise SystemExit(min(main(), 100))
