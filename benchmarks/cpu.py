"""Attention on CPUs beside the machine's matrix product, torch's fused attention and FlexAttention. `benchmarks/attention.py` calls `main`.

Whatever is compared runs in turns, round after round, because machines change speed while one looks: GFLOP/s are those of the
fastest call, shares and ratios the median over the rounds. FLOPs: ``4 * area * num_heads_q * head_dim`` forward, 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from attention_masks import SHORT, BenchmarkMask, make_masks
from contestants import NUM_HEADS_KV, NUM_HEADS_Q, Call, Inputs, fastest, flex, gemm, ours, products_are_native, sdpa
from magi_attention.kernels.interface import AttnSettings, KernelMask
from magi_attention.kernels.registry import load
from magi_attention.mask import AttnMask, varlen
from magi_attention.testing.kernel_check import KernelInputs, run_kernel
from magi_attention.testing.oracle import assert_results_as_exact, attention_oracle, plain_result
from tables import write_csv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_TOKENS = 1024
BACKWARD_FLOPS = 2.5
WAYS = ("forward", "backward")
ERRORS = ("out", "dq", "dk", "dv", "lse")
FIELDS = (
    *("threads", "head_dim", "tokens", "dtype", "mask", "density", "gemm_gflops"),
    *(f"{way}_{what}" for way in WAYS for what in ("gflops", "share", "over_sdpa")),
    *("forward_over_flex", "sdpa_error", "flex_error"),
    *(f"error_{name}" for name in ERRORS),
    "within_rule",
)

# Runs in a process of its own: what a first call costs beyond importing torch and the library's front.
_FIRST_CALL = """
import time, torch
from magi_attention.functional.flex_flash_attn import flex_flash_attn_func
x = torch.randn(64, 1, 64)
ranges = torch.tensor([[0, 64]], dtype=torch.int32)
start = time.perf_counter()
flex_flash_attn_func(x, x, x, ranges, ranges)
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    threads: int
    head_dim: int
    tokens: int
    dtype: str
    mask: str


class Turns:
    """Seconds of calls that run in turns: the fastest of each round, by name."""

    def __init__(self, calls: dict[str, Call], num_rounds: int, enough_s: float, patience_s: float) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        spent = dict.fromkeys(calls, 0.0)
        for _ in range(num_rounds):
            for name, call in calls.items():
                # What takes long is timed long enough by fewer rounds.
                if spent[name] > patience_s:
                    continue
                start = time.perf_counter()
                self.seconds[name].append(fastest(call, enough_s))
                spent[name] += time.perf_counter() - start

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """The median over rounds of how many times longer ``slower`` took than ``faster``."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=False)
        return statistics.median(a / b for a, b in pairs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `main` reads beside ``masks`` and ``csv``."""
    parser.add_argument("--quick", action="store_true", help="one thread, head_dim 128, 4,096 tokens, fewer rounds")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument(
        "--rival-tokens", type=int, nargs="*", default=[4096], help="the lengths at which other libraries run too"
    )
    parser.add_argument(
        "--documents", type=int, help="of the comparison of short documents with long ones (10,000; 0: none)"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--patience", type=float, help="seconds after which a call is given no further round")


def main(args: argparse.Namespace) -> int:
    """Measure and print; returns how many results break the tolerance rule."""
    rounds = args.rounds or (3 if args.quick else 5)
    patience = args.patience or (2.0 if args.quick else 8.0)
    cases = _cases(args)
    _print_machine(args.dtypes)
    _print_start()
    errors: dict[tuple[int, str, str], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    block: tuple[object, ...] = ()
    for case in cases:
        if block != (block := (case.threads, case.head_dim, case.tokens, case.dtype)):
            _print_heading(case)
        torch.set_num_threads(case.threads)
        key = (case.head_dim, case.dtype, case.mask)
        if key not in errors:
            errors[key] = _errors(*key)
        row = vars(case) | _measure(case, rounds, patience, case.tokens in args.rival_tokens) | errors[key]
        rows.append(row)
        _print_row(row)
    num_documents = 0 if args.quick else 10_000 if args.documents is None else args.documents
    _print_short_documents(args.dtypes, num_documents, rounds)
    if args.csv is not None:
        write_csv(args.csv, FIELDS, rows)
    return sum(not one["within_rule"] for one in errors.values())


def _cases(args: argparse.Namespace) -> list[Case]:
    threads = args.threads or ([1] if args.quick else [1, 2])
    head_dims = args.head_dims or ([128] if args.quick else [128, 64])
    tokens = args.tokens or ([4096] if args.quick else [4096, 8192])
    known = list({name: None for one in tokens for name in make_masks(one)})
    unknown = sorted(set(args.masks or []) - set(known))
    if unknown:
        raise ValueError(f"--masks must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [
        Case(num_threads, head_dim, num_tokens, dtype, mask)
        for num_threads in threads
        for head_dim in head_dims
        for num_tokens in tokens
        for dtype in args.dtypes
        for mask in args.masks or known
    ]


def _measure(case: Case, num_rounds: int, patience_s: float, with_rivals: bool) -> dict[str, Any]:
    """Rates, shares and ratios of one case."""
    mask, dtype = make_masks(case.tokens)[case.mask], DTYPES[case.dtype]
    x = Inputs.random(case.tokens, case.head_dim, dtype)
    product, product_flops = gemm(dtype)
    row: dict[str, Any] = {"density": mask.mask.area / case.tokens**2}
    calls = {"gemm": product, **ours(mask.mask, x)}
    if with_rivals:
        for name, make in (("sdpa", sdpa), ("flex", flex)):
            try:
                calls |= {f"{name} {way}": call for way, call in make(mask, x).items()}
            except Exception as error:  # a rival that cannot run is a row that says why
                row[f"{name}_error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    turns = Turns(calls, num_rounds, enough_s=0.1, patience_s=patience_s)
    row["gemm_gflops"] = product_flops / turns.best("gemm") / 1e9
    for way in WAYS:
        flops = _flops(mask.mask, case.head_dim, way)
        row[f"{way}_gflops"] = flops / turns.best(way) / 1e9
        row[f"{way}_share"] = turns.ratio("gemm", way) * flops / product_flops
        for rival in ("sdpa", "flex"):
            if f"{rival} {way}" in calls:
                row[f"{way}_over_{rival}"] = turns.ratio(f"{rival} {way}", way)
    return row


def _flops(mask: AttnMask, head_dim: int, way: str) -> float:
    return 4.0 * mask.area * NUM_HEADS_Q * head_dim * (BACKWARD_FLOPS if way == "backward" else 1.0)


def _print_short_documents(dtypes: list[str], num_documents: int, num_rounds: int) -> None:
    """What a slice costs: documents of 32 tokens, causal and full, beside causal documents of some hundreds (the mask "varlen").

    Outputs go to fresh memory, as the C library hands out large tensors, and then to memory that it keeps, as other allocators do.
    """
    if not num_documents:
        return
    torch.set_num_threads(1)
    print(
        f"\n{num_documents:,} documents of {SHORT} tokens, head_dim 128, 1 thread: GFLOP/s (share of long documents' rate)\n"
        f"{'memory':<8}{'dtype':<7}{'mask':<8}{'forward':>14}{'backward':>14}",
        flush=True,
    )
    for memory in ("fresh", "kept"):
        if memory == "kept" and not _keep_memory():
            print("this C library cannot be told to keep memory")
            return
        for dtype in dtypes:
            for mask, rates in _short_documents(DTYPES[dtype], num_documents, num_rounds).items():
                columns = "".join(f"{f'{rate:.0f} ({share:.2f})':>14}" for rate, share in rates)
                print(f"{memory:<8}{dtype:<7}{mask:<8}{columns}", flush=True)


def _keep_memory() -> bool:
    """Have the C library keep what is freed, for the rest of the process. False: it does not know how."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # of glibc's malloc.h
    return mallopt is not None and bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


def _short_documents(dtype: torch.dtype, num_documents: int, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By mask, forward and backward: GFLOP/s of short documents, and the share of the long ones' rate."""
    total = num_documents * SHORT
    edges, long = range(0, total + 1, SHORT), make_masks(8192)["varlen"].mask
    short = {"causal": varlen(edges, causal=True), "full": varlen(edges, causal=False)}
    x = Inputs.random(total, 128, dtype)
    calls = {f"long {way}": call for way, call in ours(long, Inputs.random(8192, 128, dtype)).items()}
    for name, mask in short.items():
        calls |= {f"{name} {way}": call for way, call in ours(mask, x).items()}
    turns = Turns(calls, num_rounds, enough_s=0.1, patience_s=60.0)

    def rate(name: str, mask: AttnMask, way: str) -> tuple[float, float]:
        share = turns.ratio(f"long {way}", f"{name} {way}") * mask.area / long.area
        return _flops(mask, 128, way) / turns.best(f"{name} {way}") / 1e9, share

    return {name: [rate(name, mask, way) for way in WAYS] for name, mask in short.items()}


def _errors(head_dim: int, dtype_name: str, mask_name: str) -> dict[str, Any]:
    """Largest errors of a short version against float64, relative to the largest true value (of lse: absolute), and whether they keep the
    tolerance rule: at most twice those of plain torch in the inputs' precision."""
    mask: BenchmarkMask = make_masks(ERROR_TOKENS)[mask_name]
    x = Inputs.random(ERROR_TOKENS, head_dim, DTYPES[dtype_name])
    attended = torch.from_numpy(mask.mask.to_dense())
    exact = attention_oracle(x.q, x.k, x.v, attended, dout=x.dout)
    plain = plain_result(x.q, x.k, x.v, attended, dout=x.dout)
    kernel_mask = KernelMask(mask.mask.bands, ERROR_TOKENS, ERROR_TOKENS)
    inputs = KernelInputs(x.q, x.k, x.v, x.dout)
    actual = run_kernel(load("cpu"), inputs, kernel_mask, AttnSettings(softmax_scale=head_dim**-0.5))
    row: dict[str, Any] = {"within_rule": True}
    for name in ERRORS:
        value, truth = getattr(actual, name), getattr(exact, name)
        scale = 1.0 if name == "lse" else truth.abs().max().item()
        row[f"error_{name}"] = (value.double() - truth).abs().max().item() / scale
    try:
        assert_results_as_exact(actual, exact, plain)
    except AssertionError as error:
        row["within_rule"] = False
        print(f"WRONG {mask_name} {dtype_name} head_dim {head_dim}: {error}")
    return row


def _print_machine(dtypes: list[str]) -> None:
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; "
        f"{NUM_HEADS_Q} q heads, {NUM_HEADS_KV} kv heads"
    )
    if "bf16" in dtypes and not products_are_native(torch.bfloat16):
        print("this CPU has no products of bf16: bf16 is held to the peak of fp32")
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        print(f"oneDNN is held to {os.environ['ONEDNN_MAX_CPU_ISA']}")


def _print_start() -> None:
    """Seconds of the first call of two processes: the first compiles into an empty cache, the second finds it filled."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        command = [sys.executable, "-c", _FIRST_CALL]
        seconds = [
            float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for _ in range(2)
        ]
    print(f"first call: {seconds[0]:.1f} s with an empty cache, {seconds[1]:.3f} s in a later process")


def _print_heading(case: Case) -> None:
    print(
        f"\n{case.dtype}, head_dim {case.head_dim}, {case.tokens:,} tokens, {case.threads} thread{'s'[: case.threads > 1]}: "
        "GFLOP/s (share of GEMM peak), times as fast as SDPA and FlexAttention\n"
        f"{'mask':<13}{'cells':>6}{'GEMM':>6} | {'forward':>12}{'SDPA':>7}{'Flex':>7} | {'backward':>12}{'SDPA':>7} | "
        + "".join(f"{'error ' + name if name == 'out' else name:>10}" for name in ERRORS),
        flush=True,
    )


def _print_row(row: dict[str, Any]) -> None:
    def times(name: str) -> str:
        return f"{row[name]:6.1f}x" if name in row else f"{'-':>7}"

    def rate(way: str) -> str:
        return f"{row[f'{way}_gflops']:6.0f} ({row[f'{way}_share']:.2f})"

    print(
        f"{row['mask']:<13}{row['density']:6.1%}{row['gemm_gflops']:6.0f} | {rate('forward'):>13}"
        f"{times('forward_over_sdpa')}{times('forward_over_flex')} | {rate('backward'):>13}{times('backward_over_sdpa')} | "
        + "".join(f"{row[f'error_{name}']:10.1e}" for name in ERRORS)
        + ("" if row["within_rule"] else "  WRONG"),
        flush=True,
    )
    for rival in ("sdpa", "flex"):
        if f"{rival}_error" in row:
            print(f"  {rival} did not run: {row[f'{rival}_error']}", flush=True)
