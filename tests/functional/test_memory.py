"""A forward and backward may add at most three times the bytes of q, k, v, out and their gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import re, sys, torch
torch.set_num_threads(1)
from magi_attention.functional import flex_flash_attn_func

def resident(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def attend(num_tokens):
    ranges = torch.tensor([[0, num_tokens]], dtype=torch.int32)
    q, k, v = (torch.randn(num_tokens, 2, 64).requires_grad_() for _ in range(3))
    before = resident("VmRSS")
    out, _ = flex_flash_attn_func(q, k, v, ranges, ranges, torch.ones(1, dtype=torch.int32))
    out.backward(torch.ones_like(out))
    return before, 8 * q.nbytes

attend(64)  # what is loaded on first use
before, num_bytes = attend(int(sys.argv[1]))
print((resident("VmHWM") - before) / num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_added_memory() -> None:
    # Here logits alone, were they kept, would be 16 times the bytes of the inputs and their gradients.
    done = subprocess.run([sys.executable, "-c", PROGRAM, "8192"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 3.0
