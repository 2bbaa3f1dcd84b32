"""How fast and how exact attention is on this machine: ``python benchmarks/attention.py --device cpu``, or ``cuda``.

``--help`` after the device lists its options. The measuring is in `cpu.py` and `gpu.py` beside this file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

_MODULES = {"cpu": "cpu", "cuda": "gpu"}


def main() -> int:
    """Pick the device's benchmark, parse its options, run it; returns the number of wrong results, at most 100."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--device", choices=_MODULES, default="cpu")
    device = first.parse_known_args()[0].device
    _choose_instructions(device)
    benchmark = _load(device)
    parser = argparse.ArgumentParser(
        description=benchmark.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first]
    )
    parser.add_argument("--masks", nargs="+", help="only these masks")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    benchmark.add_arguments(parser)
    try:
        failures: int = benchmark.main(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
    return min(failures, 100)


def _choose_instructions(device: str) -> None:
    """Where the CPU has AMX, the peak to be held to is the one without it: oneDNN reads this when torch first multiplies.

    SDPA and FlexAttention are then without AMX too; the benchmark prints that. A value that the user has set stays.
    """
    cpu_info = Path("/proc/cpuinfo")
    if device == "cpu" and cpu_info.exists() and "amx_bf16" in cpu_info.read_text():
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def _load(device: str) -> ModuleType:
    path = Path(__file__).with_name(f"{_MODULES[device]}.py")
    if not path.exists():
        sys.exit(
            f"--device {device} needs {path.name} beside {Path(__file__).name}, which is not there: use a full checkout"
        )
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("--device cuda needs a CUDA device, and torch sees none: use --device cpu")
    return importlib.import_module(_MODULES[device])


if __name__ == "__main__":
    sys.exit(main())
