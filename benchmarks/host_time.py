"""What an eager call costs the host: ``python benchmarks/host_time.py --beside DIR/src``, on a GPU or, with small tensors, on a CPU.

Two versions of the package take turns, each in a process of its own. The table gives the median of the rounds' ratios, so whatever else the
machine does meets both versions alike. DIR is a checkout (``git worktree add DIR REVISION``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
NUM_TOKENS, NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 64, 4, 2, 32


def calls(device: str) -> dict[str, Callable[[], object]]:
    """Eager calls of few tokens, forward and backward, on one rank."""
    import torch

    from magi_attention.api import calc_attn, dispatch, magi_attn_flex_key, roll, undispatch
    from magi_attention.functional import flex_flash_attn_func

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(NUM_TOKENS, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for heads in (NUM_HEADS_Q, NUM_HEADS_KV, NUM_HEADS_KV)
    )
    ranges = torch.tensor([[0, 40], [40, NUM_TOKENS]], dtype=torch.int32, device=device)
    types = torch.tensor([1, 1], dtype=torch.int32, device=device)
    pairs = [[0, 40], [40, NUM_TOKENS]]
    key = magi_attn_flex_key(
        pairs, pairs, "causal", NUM_TOKENS, NUM_TOKENS, NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM, chunk_size=8
    )
    grad = torch.randn(NUM_TOKENS, NUM_HEADS_Q, HEAD_DIM, device=device, dtype=dtype)

    def flex() -> torch.Tensor:
        return flex_flash_attn_func(q, k, v, ranges, ranges, types)[0]

    def distributed() -> torch.Tensor:
        return calc_attn(q, k, v, key)[0]

    def without_grad(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def with_backward(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), grad)

    return {
        "flex_flash_attn_func": without_grad(flex),
        "flex_flash_attn_func, and backward": with_backward(flex),
        "calc_attn": without_grad(distributed),
        "calc_attn, and backward": with_backward(distributed),
        "dispatch": lambda: dispatch(q, key),
        "undispatch": lambda: undispatch(q, key),
        "roll": lambda: roll(q, -1, 0, key),
    }


def measure(device: str, num_calls: int, repeats: int) -> dict[str, float]:
    """Microseconds a call, the least of several repeats: what the host needs when nothing disturbs it."""
    import torch

    torch.set_num_threads(1)

    def settle() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    these = calls(device)
    found = dict.fromkeys(these, float("inf"))
    for call in these.values():
        call()
    for _ in range(repeats):
        for name, call in these.items():
            settle()
            start = time.perf_counter()
            for _ in range(num_calls):
                call()
            found[name] = min(found[name], (time.perf_counter() - start) / num_calls * 1e6)
    settle()
    return found


def in_a_process(source: Path, device: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", "--device", device]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--beside", type=Path, default=SRC, help="the src folder of the version to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.device, num_calls=10, repeats=100)))
        return
    rounds = [(in_a_process(SRC, args.device), in_a_process(args.beside, args.device)) for _ in range(args.rounds)]
    print(
        f"host microseconds a call, {args.device}, {args.rounds} rounds: least of all, and the median of the rounds' ratios"
    )
    print(f"{'call':<36} {'this':>8} {'beside':>8} {'ratio':>7}")
    for name in rounds[0][0]:
        ours, theirs = ([one[at][name] for one in rounds] for at in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"{name:<36} {min(ours):>8.1f} {min(theirs):>8.1f} {ratio:>7.3f}")


if __name__ == "__main__":
    main()
