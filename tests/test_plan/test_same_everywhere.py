"""The same plan on every processor, with any number of threads, whatever order a process gives to hashes.

Ranks plan for themselves, and a cluster's hosts differ: a plan that depends on them sends rows that nobody waits for. The digests of
100 random plans are kept, as the golden plans are, so that each machine and each numpy that runs the tests is held to the same ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
    from numpy._core import _multiarray_umath as umath
else:
    from numpy.core import _multiarray_umath as umath

SCRIPT = Path(__file__).parent / "plan_digests.py"
KEPT = Path(__file__).parent / "golden" / "random_plans.digests"

# What this numpy chooses at run time and this processor has, simple features first; a feature goes with all that need it.
FEATURES: list[str] = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]


def switched_off(least: int = 3) -> list[str]:
    """At least ``least`` sets of features, as far as there are so many: all, and the more advanced ones in several sizes."""
    starts = sorted({at * len(FEATURES) // (least + 1) for at in range(least + 1)} - {len(FEATURES)})
    return [" ".join(FEATURES[at:]) for at in starts]


def planned(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not FEATURES, reason="this numpy chooses nothing by the processor's features")
@pytest.mark.parametrize("features", switched_off())
def test_plans_are_the_kept_ones_with_features_switched_off(features: str) -> None:
    assert planned(NPY_DISABLE_CPU_FEATURES=features) == KEPT.read_text(encoding="utf-8").split()


def test_plans_are_the_kept_ones_with_other_threads_and_hashes() -> None:
    changed = {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3", "PYTHONHASHSEED": "12345"}
    assert planned(**changed) == KEPT.read_text(encoding="utf-8").split()


def test_three_sets_are_tried_where_the_processor_has_them() -> None:
    assert len(switched_off()) >= min(3, len(FEATURES))
