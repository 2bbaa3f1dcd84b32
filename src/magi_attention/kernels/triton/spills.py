"""Entries of the table of tiles whose code does not fit the registers: the bytes a thread that the compiler keeps in memory at most.

From ``python benchmarks/compile_report.py`` with Triton 3.6, the most over all cases; entries that are not here keep none. Most are a few
bytes outside the inner loops, or belong to tiles that were the fastest on an H200 all the same (``docs/results/h200.md``).
"""

from __future__ import annotations

# By architecture: (kernel, row of the table, bytes of an element).
SPILLS: dict[str, dict[tuple[str, int, int], int]] = {
    "sm_80": {
        ("dkdv", 64, 2): 56,
        ("dkdv", 64, 4): 8,
        ("dkdv", 128, 4): 264,
        ("dkdv", 256, 2): 88,
        ("dkdv", 256, 4): 2128,
        ("dq", 64, 2): 8,
        ("dq", 128, 4): 8,
        ("forward", 64, 2): 48,
        ("forward", 128, 2): 40,
        ("forward", 256, 2): 608,
        ("forward", 256, 4): 24,
    },
    "sm_86": {
        ("dkdv", 64, 2): 24,
        ("dkdv", 128, 4): 240,
        ("dkdv", 256, 2): 56,
        ("dkdv", 256, 4): 2096,
        ("dq", 64, 2): 40,
        ("dq", 256, 2): 24,
        ("forward", 64, 2): 16,
        ("forward", 256, 4): 24,
    },
    "sm_90": {
        ("dkdv", 64, 2): 48,
        ("dkdv", 128, 2): 384,
        ("dkdv", 128, 4): 248,
        ("dkdv", 256, 2): 512,
        ("dkdv", 256, 4): 2104,
        ("dq", 128, 2): 944,
        ("dq", 256, 2): 632,
        ("forward", 128, 2): 64,
        ("forward", 256, 2): 664,
        ("forward", 256, 4): 16,
    },
    "sm_100": {
        ("dkdv", 128, 2): 536,
        ("dkdv", 128, 4): 248,
        ("dkdv", 256, 4): 1872,
        ("dq", 64, 4): 8,
        ("dq", 128, 2): 128,
        ("dq", 256, 2): 160,
        ("forward", 256, 2): 824,
        ("forward", 256, 4): 8,
    },
    "sm_120": {
        ("forward", 128, 2): 32,
        ("dkdv", 128, 4): 248,
        ("dkdv", 256, 2): 16,
        ("dkdv", 256, 4): 2216,
        ("dq", 64, 2): 48,
        ("dq", 64, 4): 16,
        ("dq", 256, 2): 32,
        ("forward", 64, 2): 8,
        ("forward", 256, 2): 24,
        ("forward", 256, 4): 16,
    },
}
# Where pointers and strides are no multiples of 16.
UNALIGNED_SPILLS: dict[str, dict[tuple[str, int, int], int]] = {
    "sm_80": {
        ("dkdv", 64, 2): 104,
        ("dkdv", 128, 2): 536,
        ("dq", 64, 2): 32,
        ("dq", 128, 2): 160,
        ("forward", 64, 2): 104,
        ("forward", 128, 2): 160,
    },
    "sm_86": {
        ("dkdv", 64, 2): 32,
        ("dkdv", 128, 2): 200,
        ("dq", 64, 2): 32,
        ("forward", 64, 2): 48,
        ("forward", 128, 2): 176,
    },
    "sm_90": {
        ("dkdv", 128, 2): 592,
        ("dq", 128, 2): 648,
        ("forward", 128, 2): 168,
    },
    "sm_100": {
        ("dkdv", 64, 2): 72,
        ("dkdv", 128, 2): 832,
        ("dq", 64, 2): 80,
        ("dq", 128, 2): 296,
        ("forward", 128, 2): 464,
    },
    "sm_120": {
        ("dkdv", 64, 2): 24,
        ("dkdv", 128, 2): 296,
        ("dq", 64, 2): 32,
        ("forward", 64, 2): 40,
        ("forward", 128, 2): 184,
    },
}
# The same code.
SPILLS["sm_89"] = SPILLS["sm_86"]
UNALIGNED_SPILLS["sm_89"] = UNALIGNED_SPILLS["sm_86"]
