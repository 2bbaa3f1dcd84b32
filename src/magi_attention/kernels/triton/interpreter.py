"""Whether kernels run in Triton's interpreter, on CPU tensors: for tests, on machines without a GPU."""

from __future__ import annotations

import triton


def is_interpreted() -> bool:
    """True where ``TRITON_INTERPRET=1`` was set before Triton's kernels were defined."""
    return bool(triton.knobs.runtime.interpret)
