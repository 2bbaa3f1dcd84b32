"""What holds for every test: few threads, and the same examples on every run."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Without a GPU Triton's kernels run in its interpreter, which must be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests are many and small: more threads cost more than they save, above all where each of several ranks has its own.
torch.set_num_threads(1)

# No deadline in either: a machine that does other work besides must not fail a test.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
# For looking further than the examples that everybody's run tries: HYPOTHESIS_PROFILE=search make test-long
settings.register_profile("search", max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
