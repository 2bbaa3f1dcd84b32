"""What masks promise, measured: pictures, conversion, and how few rows a matrix needs.

    python benchmarks/masks.py

Prints the time (s) and memory of a picture of a million tokens on 16 ranks, in a process of its own; the time from a ``mask_mod`` of
16,384 tokens to slices, checked against every cell; how long converters take for a million tokens, and how few rows they give; and the
slices of 1,000 random matrices beside what merging equal runs of adjacent rows gives.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from magi_attention.mask import AttnMask
from magi_attention.mask.cells import equal_runs

Rng = np.random.Generator


def picture() -> None:
    print("magi-attention show --mask varlen-block-causal --tokens 1M --ranks 16 -o mask.png")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "mask.png"
        asked = ["show", "--mask", "varlen-block-causal", "--tokens", "1M", "--ranks", "16", "-o", str(output)]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "magi_attention", *asked], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        print(
            f"  exit {process.returncode}, {seconds:.2f} s in all ({cpu:.2f} s of CPU), {memory:.0f} MiB at most, "
            f"{output.stat().st_size:,} bytes"
        )


def from_mask_mod(num_tokens: int = 16_384, window: int = 1024) -> None:
    print(f"\nmask_mod of causal documents with a window of {window:,}, {num_tokens:,} tokens, to slices")
    import torch  # late, because the memory of a process that is started counts for the one that it becomes

    rng = np.random.default_rng(0)
    edges = np.unique(np.concatenate([[0, num_tokens], rng.integers(0, num_tokens, 12)]))
    documents = torch.from_numpy(np.repeat(np.arange(len(edges) - 1), np.diff(edges)))

    def mod(b: object, h: object, q: Any, k: Any) -> Any:
        return (documents[q] == documents[k]) & (q >= k) & (q - k < window)

    AttnMask.from_mask_mod(mod, 256)  # what torch imports on first use
    start = time.perf_counter()
    mask = AttnMask.from_mask_mod(mod, num_tokens)
    q_ranges, _, _ = mask.to_slices()
    seconds = time.perf_counter() - start
    index = torch.arange(num_tokens)
    wrong = 0
    for at in range(0, num_tokens, 512):
        said = mod(0, 0, index[at : at + 512, None], index[None, :]).numpy()
        part = mask.restrict((at, at + 512)).shift(-at, 0, 512, num_tokens)
        wrong += int((part.to_dense() != said).sum())
    print(
        f"  {seconds:.2f} s, {len(mask.bands)} rows, {len(q_ranges)} slices, {wrong} of {num_tokens**2:,} cells wrong"
    )


def converters(num_tokens: int = 1 << 20) -> None:
    print(f"\nconverters, {num_tokens:,} tokens in 100 documents where nothing else is said: ms, rows")
    rng = np.random.default_rng(0)
    edges = np.unique(np.concatenate([[0, num_tokens], rng.choice(num_tokens, 99, replace=False)]))
    starts, ends = (np.repeat(side, np.diff(edges)) for side in (edges[:-1], edges[1:]))
    token, documents = np.arange(num_tokens), np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    padded = np.arange(num_tokens // 64)[None, :] < rng.integers(1, num_tokens // 64, 64)[:, None]
    by_token = np.arange(100_000)
    chunks = np.stack([by_token // 8192 * 8192, by_token + 1], axis=1)
    by_query = AttnMask.from_slices(np.stack([by_token, by_token + 1], axis=1), chunks)
    window = np.minimum(token + 4096, num_tokens)[:, None]
    asked: dict[str, Callable[[], AttnMask]] = {
        "cu_seqlens": lambda: AttnMask.from_cu_seqlens(edges, causal=True),
        "document ids": lambda: AttnMask.from_document_ids(documents),
        "position ids": lambda: AttnMask.from_position_ids(token - starts),
        "attention_mask of 64 sequences": lambda: AttnMask.from_attention_mask(padded),
        "column bounds of documents": lambda: AttnMask.from_startend_row_indices(ends[:, None], causal=True),
        "column bounds of a window of 4,096": lambda: AttnMask.from_startend_row_indices(window, causal=True),
        "chunks of 8,192, 100,000 slices, simplified": by_query.simplify,
        "chunks of 8,192, 100,000 tokens, mask_mod": lambda: AttnMask.from_mask_mod(
            lambda b, h, q, k: (q // 8192 == k // 8192) & (q >= k), 100_000
        ),
    }
    for name, convert in asked.items():
        convert()
        start = time.perf_counter()
        mask = convert()
        print(f"  {name:<44} {(time.perf_counter() - start) * 1e3:>8.1f} ms {len(mask.bands):>6,} rows")


def noise(rng: Rng, size: int) -> np.ndarray:
    """Each cell by itself, attended with a probability that is drawn once a matrix."""
    return rng.random((size, size)) < rng.random()


def disturbed(rng: Rng, size: int) -> np.ndarray:
    """Packed causal documents, half of them with a window, 1% of the cells turned over."""
    edges = [0, *np.sort(rng.integers(0, size, 4)).tolist(), size]
    window = (-1, 0) if rng.integers(2) else (int(rng.integers(2, 16)), 0)
    return AttnMask.varlen(edges, window_size=window).to_dense() ^ (rng.random((size, size)) < 0.01)


def shapes(rng: Rng, size: int) -> np.ndarray:
    """Ten random rectangles, each cut by a random band, over one another."""
    dense = np.zeros((size, size), bool)
    for _ in range(10):
        (q0, q1), (k0, k1) = (np.sort(rng.integers(0, size + 1, 2)).tolist() for _ in range(2))
        lo, hi = np.sort(rng.integers(-size, size, 2)).tolist()
        diagonal = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
        dense[q0:q1, k0:k1] |= (lo <= diagonal) & (diagonal <= hi)
    return dense


def decompositions(count: int, size: int = 64) -> None:
    print(f"\n{count:,} random dense matrices of {size} x {size}: slices, beside merging equal runs of adjacent rows")
    kinds: dict[str, Callable[[Rng, int], np.ndarray]] = {
        "noise, density uniform in [0, 1]": noise,
        "causal documents, 1% of cells turned": disturbed,
        "ten rectangles cut by bands": shapes,
    }
    for name, make in kinds.items():
        rng = np.random.default_rng(0)
        merged = slices = rows = more = inexact = 0
        start = time.perf_counter()
        for _ in range(count):
            dense = make(rng, size)
            mask = AttnMask.from_dense(dense)
            few, bound = len(mask.to_slices()[2]), len(equal_runs(dense))
            merged, slices, rows = merged + bound, slices + few, rows + len(mask.bands)
            more += few > bound
            inexact += not (mask.to_dense() == dense).all()
        seconds = time.perf_counter() - start
        print(
            f"  {name:<38} {slices:>9,} slices ({rows:,} rows), merging {merged:>9,}; more than merging in {more}, "
            f"inexact {inexact}; {seconds:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--matrices", type=int, default=1000, help="of each kind (1000)")
    args = parser.parse_args()
    picture()
    from_mask_mod()
    converters()
    decompositions(args.matrices)


if __name__ == "__main__":
    main()
