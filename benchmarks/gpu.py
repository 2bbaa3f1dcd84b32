"""Attention on one GPU: right first, then how fast. ``python benchmarks/attention.py --device cuda`` calls `main`.

Correctness: every mask family, dtype and awkward head dim against the float64 oracle, fresh random inputs, outputs poisoned, run twice.
Speed: TFLOP/s forward and backward beside torch's fused attention (flash, cuDNN), compiled FlexAttention and what there is of flash-attn,
in one run with the machine's own GEMM and copy ceilings. FLOPs: ``4 * area * num_heads_q * head_dim`` forward, 2.5 times that backward. A
backward is all that one needs: the row sums of ``out * dout`` too.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from magi_attention.kernels.interface import AttnSettings, Backend, KernelMask
from magi_attention.kernels.registry import load
from magi_attention.kernels.row_dots import row_dots
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import tighten
from magi_attention.testing.kernel_check import KernelCase, check_kernel, make_inputs
from magi_attention.testing.mask_families import MASK_FAMILIES
from magi_attention.testing.poison import poisoned_memory
from tables import write_csv

NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 64, 8, 128
FIELDS = (
    *("tokens", "head_dim", "mask", "method"),
    *(f"{way}_{what}" for way in ("forward", "backward") for what in ("tflops", "ms")),
    "error",
)
# Documents of a sequence, as shares of its length.
SHARES = (0.25, 0.03125, 0.1875, 0.0625, 0.125, 0.21875, 0.015625, 0.109375)


@dataclass(frozen=True)
class Timing:
    """Median milliseconds."""

    forward: float
    backward: float | None


def document_ranges(total: int) -> list[tuple[int, int]]:
    """Documents of the shares above."""
    ends = np.cumsum([round(share * total) for share in SHARES])
    ends[-1] = total
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def block_causal(total: int, block: int = 1024) -> AttnMask:
    """Two packed documents, each causal by blocks."""
    q_ranges, k_ranges = [], []
    for start, end in ((0, total * 5 // 8), (total * 5 // 8, total)):
        for at in range(start, end, block):
            q_ranges.append((at, min(at + block, end)))
            k_ranges.append((start, min(at + block, end)))
    return AttnMask.from_slices(q_ranges, k_ranges, "full", total, total)


def masks(total: int) -> dict[str, AttnMask]:
    """The masks of the table."""
    documents = document_ranges(total)
    window = tighten(np.array([[0, total, 0, total, -1023, 0]], np.int64))[0]
    return {
        "full": AttnMask.from_slices([(0, total)], [(0, total)], "full"),
        "causal": AttnMask.from_slices([(0, total)], [(0, total)], "causal"),
        "varlen full": AttnMask.from_slices(documents, documents, "full"),
        "varlen causal": AttnMask.from_slices(documents, documents, "causal"),
        "window causal 1024": AttnMask(window, total, total),
        "varlen block causal": block_causal(total),
    }


def with_other_modes(cases: list[KernelCase]) -> list[KernelCase]:
    """The cases, those of the masks at head_dim 128 too, and those in half precision without determinism too."""
    cases = cases + [replace(case, head_dim=128) for case in cases if case.head_dim == 64 and case.head_dim_v is None]
    half = (torch.bfloat16, torch.float16)
    return cases + [replace(case, deterministic=False) for case in cases if case.dtype in half]


def can_take(backend: Backend, case: KernelCase) -> bool:
    """Whether the backend serves such inputs on this GPU."""
    x = make_inputs(replace(case, num_tokens=16), "cuda")
    return backend.unsupported(x.q, x.k, x.v, case.settings) is None


def check(backend_name: str) -> int:
    """How many cases fail; each failure is printed."""
    backend = load(backend_name)
    low = (torch.bfloat16, torch.float16, torch.float32)
    cases = [KernelCase(family, dtype) for family in MASK_FAMILIES for dtype in low]
    dims = [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (33, 65)]
    cases += [KernelCase(dtype=dtype, head_dim=d, head_dim_v=dv) for d, dv in dims for dtype in low]
    cases += [
        KernelCase(family, dtype, 1009, 8, 2, head_dim=128)
        for family in ("varlen_causal", "window", "random_b", "split_by_diagonal")
        for dtype in (torch.bfloat16, torch.float32)
    ]
    cases += [KernelCase(family, torch.bfloat16, softcap=30.0, head_dim=64) for family in ("causal", "random_a")]
    cases = [case for case in with_other_modes(cases) if can_take(backend, case)]
    failures = 0
    for case in cases:
        for _ in range(2):
            try:
                with poisoned_memory():
                    check_kernel(backend, case, "cuda")
            except Exception as error:  # a table of what fails is the point
                failures += 1
                print(f"FAILED {case}: {type(error).__name__}: {str(error)[:300]}")
                break
    print(f"correctness, {backend_name}: {len(cases) - failures} of {len(cases)} cases pass, each run twice")
    return failures


def timed(run: Callable[[], object], seconds: float = 0.25) -> float:
    """Median milliseconds of a GPU function, by events."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = int(min(50, max(5, seconds / (time.perf_counter() - start))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return float(np.median([begin.elapsed_time(end) for begin, end in marks]))


def ceilings() -> tuple[float, float]:
    """TFLOP/s of a large bf16 matrix product on random data, and TB/s of a copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    return 2 * 8192**3 / timed(lambda: a @ b) / 1e9, 2 * x.nbytes / timed(lambda: y.copy_(x)) / 1e9


@dataclass(frozen=True)
class Inputs:
    """``[tokens, heads, head_dim]`` bf16."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def random(total: int, head_dim: int = HEAD_DIM) -> Inputs:
        def new(heads: int) -> Tensor:
            return torch.randn(total, heads, head_dim, device="cuda", dtype=torch.bfloat16)

        return Inputs(new(NUM_HEADS_Q), new(NUM_HEADS_KV), new(NUM_HEADS_KV), new(NUM_HEADS_Q))


def time_ours(backend_name: str, mask: AttnMask, x: Inputs) -> Timing:
    """Kernels alone: work lists are built by the warm-up and kept, as the runtime keeps them."""
    backend, settings = load(backend_name), AttnSettings(softmax_scale=x.q.shape[2] ** -0.5)
    kernel_mask = KernelMask(mask.bands, mask.num_q, mask.num_k)
    out, lse, _ = backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=x.q.dtype)

    def backward() -> object:
        delta = row_dots(out, x.dout)
        return backend.backward(x.dout, x.q, x.k, x.v, lse, delta, kernel_mask, settings, grad_dtype=x.q.dtype)

    forward = timed(lambda: backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=x.q.dtype))
    return Timing(forward, timed(backward))


def _batched(x: Inputs) -> tuple[Tensor, ...]:
    """``[1, heads, tokens, head_dim]``, keys and values repeated where torch wants equal heads."""
    return tuple(t.transpose(0, 1).unsqueeze(0).contiguous() for t in (x.q, x.k, x.v, x.dout))


def _time_autograd(run: Callable[..., Tensor], tensors: tuple[Tensor, ...], dout: Tensor) -> Timing:
    leaves = [t.detach().requires_grad_() for t in tensors]
    forward = timed(lambda: run(*(t.detach() for t in tensors)))
    out = run(*leaves)
    backward = timed(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    return Timing(forward, backward)


def time_sdpa(kind: str, is_causal: bool, x: Inputs) -> Timing:
    """torch's fused attention by one of its backends; keys are repeated where it does not take grouped heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = _batched(x)
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[kind]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    return _time_autograd(run, (q, k, v), dout)


# What each of the flash-attn packages is imported as, newest first.
FLASH_PACKAGES = {
    "flash-attn cute": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}
FLASH_MASKS = ("full", "causal", "varlen full", "varlen causal", "window causal 1024")


def flash_packages() -> dict[str, ModuleType]:
    """Those of the flash-attn packages that this machine has."""
    found = {}
    for method, name in FLASH_PACKAGES.items():
        try:
            module = importlib.import_module(name)
        except Exception as error:  # compiled for another torch, say
            if not isinstance(error, ModuleNotFoundError):
                print(f"{method} left out: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        if hasattr(module, "flash_attn_func"):  # flash_attn is a bare folder where only flash_attn.cute is there
            found[method] = module
    return found


def time_flash(package: ModuleType, name: str, x: Inputs) -> Timing:
    """A flash-attn package by its public functions; its kernels are compiled by the warm-up where it compiles any."""
    causal = name in ("causal", "varlen causal")

    def output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:  # some return the log-sum-exp too
        return returned[0] if isinstance(returned, tuple) else returned

    if name.startswith("varlen"):
        documents = document_ranges(x.q.shape[0])
        starts = torch.tensor([0, *(end for _, end in documents)], dtype=torch.int32, device="cuda")
        longest = max(end - start for start, end in documents)
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        run = partial(package.flash_attn_varlen_func, causal=causal, **lengths)
        return _time_autograd(lambda *qkv: output(run(*qkv)), (x.q, x.k, x.v), x.dout)
    window = {"window_size": (1023, 0)} if name.startswith("window") else {}
    run = partial(package.flash_attn_func, causal=causal, **window)
    tensors = tuple(t.unsqueeze(0) for t in (x.q, x.k, x.v))
    return _time_autograd(lambda *qkv: output(run(*qkv)), tensors, x.dout.unsqueeze(0))


def time_flex(mask: AttnMask, name: str, x: Inputs) -> Timing:
    """Compiled FlexAttention with a block mask of the same cells."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = mask.num_q
    document = torch.zeros(total, dtype=torch.int32, device="cuda")
    for number, (start, end) in enumerate(document_ranges(total)):
        document[start:end] = number
    half = torch.arange(total, device="cuda") >= total * 5 // 8
    rules: dict[str, Callable[..., Tensor]] = {
        "full": lambda b, h, i, j: i >= 0,
        "causal": lambda b, h, i, j: i >= j,
        "varlen full": lambda b, h, i, j: document[i] == document[j],
        "varlen causal": lambda b, h, i, j: (document[i] == document[j]) & (i >= j),
        "window causal 1024": lambda b, h, i, j: (i >= j) & (i - j < 1024),
        "varlen block causal": lambda b, h, i, j: (half[i] == half[j]) & (i // 1024 >= j // 1024),
    }
    block_mask = create_block_mask(rules[name], None, None, total, total, device="cuda")
    torch._dynamo.reset()  # another mask is another kernel; recompilations of earlier ones would exhaust its limit
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v, dout = _batched(x)
    return _time_autograd(lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=True), (q, k, v), dout)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row a (length, mask, method)."""
    flash = {} if args.ours_only else flash_packages()
    for total in args.lengths:
        x = Inputs.random(total, args.head_dim)
        for name, mask in masks(total).items():
            if args.masks and name not in args.masks:
                continue
            methods: dict[str, Callable[[], Timing]] = {one: partial(time_ours, one, mask, x) for one in args.backends}
            if not args.ours_only:
                if name in ("full", "causal"):
                    for kind in ("flash", "cudnn"):
                        methods[f"sdpa {kind}"] = partial(time_sdpa, kind, name == "causal", x)
                if name in FLASH_MASKS:
                    methods |= {method: partial(time_flash, package, name, x) for method, package in flash.items()}
                if total in args.flex_lengths:  # each takes a minute to compile
                    methods["flex"] = partial(time_flex, mask, name, x)
            for method, run in methods.items():
                row: dict[str, object] = {"tokens": total, "head_dim": args.head_dim, "mask": name, "method": method}
                yield _measured(row, 4 * mask.area * NUM_HEADS_Q * args.head_dim, run)


def _measured(row: dict[str, object], flops: float, run: Callable[[], Timing]) -> dict[str, object]:
    """The row with what was measured, of a method that computes ``flops`` forward."""
    title = f"{row['tokens']:>6} {row['mask']:<20} {row['method']:<15}"
    try:
        timing = run()
    except Exception as error:  # a method that cannot run is a row that says so
        row["error"] = f"{type(error).__name__}: {str(error)[:120]}"
        print(title, row["error"], flush=True)
        return row
    row |= {"forward_tflops": flops / timing.forward / 1e9, "forward_ms": timing.forward}
    if timing.backward:
        row |= {"backward_tflops": 2.5 * flops / timing.backward / 1e9, "backward_ms": timing.backward}
    backward = f"{row['backward_tflops']:>8.1f}" if timing.backward else f"{'-':>8}"
    print(f"{title} fwd {row['forward_tflops']:>7.1f}  bwd {backward}", flush=True)
    return row


def sweep_tiles(total: int, budget: float = 180.0) -> None:
    """TFLOP/s of other tile configurations, causal and full: what the table in configs.py was chosen from."""
    from magi_attention.kernels.triton import configs

    x, chosen = Inputs.random(total), configs._HOPPER[HEAD_DIM]
    started = time.perf_counter()
    options = {
        "forward": itertools.product((128, 64), (64, 128), (4, 8), (2, 3)),
        "dkdv": itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
        "dq": itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    }
    causal = masks(total)["causal"]
    settings = AttnSettings(softmax_scale=HEAD_DIM**-0.5)
    backend, kernel_mask = load("triton"), KernelMask(causal.bands, total, total)
    out, lse, _ = backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=x.q.dtype)
    delta = row_dots(out, x.dout)
    flops = 4 * causal.area * NUM_HEADS_Q * HEAD_DIM
    for kernel, grid in options.items():
        found = []
        for q, k, warps, stages in grid:
            if time.perf_counter() - started > budget:
                break
            tiles = configs.Tiles(q, k, warps, stages)
            configs._HOPPER[HEAD_DIM] = configs.KernelTiles(
                **{name: tiles if name == kernel else getattr(chosen, name) for name in ("forward", "dkdv", "dq")}
            )
            try:
                if kernel == "forward":
                    ms = timed(lambda: backend.forward(x.q, x.k, x.v, kernel_mask, settings, out_dtype=x.q.dtype), 0.05)
                else:
                    ms = timed(
                        lambda: backend.backward(
                            x.dout, x.q, x.k, x.v, lse, delta, kernel_mask, settings, grad_dtype=x.q.dtype
                        ),
                        0.05,
                    )
            except Exception as error:  # a configuration that does not fit is skipped
                print(f"  {kernel} {tiles}: {type(error).__name__}")
                continue
            found.append((ms, tiles))
        configs._HOPPER[HEAD_DIM] = chosen
        for ms, tiles in sorted(found, key=lambda one: one[0])[:6]:
            rate = (1 if kernel == "forward" else 2.5) * flops / ms / 1e9
            print(
                f"  {kernel:<8} {tiles.q}x{tiles.k} warps {tiles.warps} stages {tiles.stages}: {ms:.3f} ms, {rate:.1f}"
            )


def plot(rows: list[dict[str, object]], picture: Path) -> None:
    """TFLOP/s by mask, one panel a length and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({int(str(row["tokens"])) for row in rows})
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    figure, panels = plt.subplots(
        2, len(lengths), figsize=(5 * len(lengths), 7), squeeze=False, constrained_layout=True
    )
    for (line, what), (column, total) in itertools.product(enumerate(("forward", "backward")), enumerate(lengths)):
        of_panel = [row for row in rows if row["tokens"] == total]
        names = list(dict.fromkeys(str(row["mask"]) for row in of_panel))
        axes = panels[line][column]
        for at, method in enumerate(methods):
            rates = {
                str(r["mask"]): float(str(r.get(f"{what}_tflops") or 0)) for r in of_panel if r["method"] == method
            }
            places = np.arange(len(names)) + (at - len(methods) / 2) * 0.8 / len(methods)
            axes.bar(places, [rates.get(name, 0) for name in names], 0.8 / len(methods), label=method)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_title(f"{what}, {total:,} tokens", fontsize=10)
        axes.set_ylabel("TFLOP/s")
        axes.grid(axis="y", alpha=0.3)
    ncols = min(len(methods), 3 * len(lengths))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=ncols, fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `main` reads."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--backends", nargs="+", help="left out: triton, and hopper on such a GPU")
    parser.add_argument("--ours-only", action="store_true", help="leave the other libraries out")
    parser.add_argument("--flex-lengths", type=int, nargs="*", default=[16384], help="where to run FlexAttention")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="also try other tile configurations")


def main(args: argparse.Namespace) -> int:
    """Check, measure, print; returns the number of wrong cases."""
    if args.backends is None:
        args.backends = ["triton", "hopper"] if torch.cuda.get_device_capability() == (9, 0) else ["triton"]
    gemm, copy = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: bf16 GEMM {gemm:.0f} TFLOP/s, copy {copy:.2f} TB/s", flush=True)
    failures = 0 if args.skip_check else sum(check(one) for one in args.backends)
    if args.sweep:
        sweep_tiles(args.lengths[0])
    rows: list[dict[str, object]] = []
    for row in measure(args):
        rows.append(row)
        if args.csv is not None:  # after each, for what is measured to outlast what comes after
            write_csv(args.csv, FIELDS, rows)
    if args.csv is not None:
        plot(rows, args.csv.with_suffix(".png"))
    return failures


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(own)
    own.add_argument("--masks", nargs="+")
    own.add_argument("--csv", type=Path)
    raise SystemExit(min(main(own.parse_args()), 100))
