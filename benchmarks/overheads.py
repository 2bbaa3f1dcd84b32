"""What surrounds the kernels on a GPU: ``python benchmarks/overheads.py``.

    small   calls so short that the host is slower than the device: microseconds that the host takes to launch a forward and a backward,
            that the device takes (a CUDA graph of them, replayed, which makes the lists of a mask that lies on the device anew), and
            beside both torch's fused attention
    lists   what a mask that is new costs before its first kernel: work lists made on the device, and on the host
    rows    the kernels that gather, sum and merge rows of an exchange, as a share of the speed of a copy

Host time of eager calls beside another version, also on a CPU: ``benchmarks/host_time.py``.

Medians. ``--csv`` writes all rows of the tables asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import ceilings, timed
from magi_attention.api import calc_attn, magi_attn_flex_key
from magi_attention.comm.row_kernels import Owners, gather_rows_into, merge_rows_, sum_rows_
from magi_attention.functional import flex_flash_attn_func
from magi_attention.kernels.interface import AttnSettings, DeviceMask, KernelMask
from magi_attention.kernels.registry import pick
from magi_attention.kernels.row_dots import row_dots
from magi_attention.mask.bands import bands_from_slices
from magi_attention.runtime.key import DistAttnRuntimeKey
from tables import write_csv

NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 32, 8, 128
Row = dict[str, object]
Call = Callable[[], object]


def host_microseconds(call: Call, num_calls: int = 20, repeats: int = 9) -> float:
    """What a call keeps the host busy for: as many in a row as no queue of the device is full of, none waited for."""
    call()
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        spent.append((time.perf_counter() - start) / num_calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(spent)


def device_microseconds(call: Call, num_calls: int = 10) -> float:
    """What the device does for a call, with nothing of the host in between: a graph of several, replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(num_calls):
            call()
    return timed(graph.replay) * 1e3 / num_calls


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)


def causal_documents(num_tokens: int, num_documents: int) -> tuple[Tensor, Tensor]:
    """``(ranges [n, 2], types [n])`` on the device."""
    edges = torch.linspace(0, num_tokens, num_documents + 1, device="cuda").round().to(torch.int32)
    return torch.stack([edges[:-1], edges[1:]], dim=1), torch.ones(num_documents, dtype=torch.int32, device="cuda")


def small() -> Iterator[Row]:
    """One row a method and length: one causal sequence, forward alone and forward with backward."""
    for num_tokens in (256, 1024, 4096):
        q, k, v = (
            normal(num_tokens, heads, HEAD_DIM).requires_grad_() for heads in (NUM_HEADS_Q, NUM_HEADS_KV, NUM_HEADS_KV)
        )
        dout = normal(num_tokens, NUM_HEADS_Q, HEAD_DIM)
        ours = partial(_attend, *causal_documents(num_tokens, 1))
        yield from _time_small("ours", num_tokens, ours, (q, k, v), dout)
        compiled = torch.compile(ours, fullgraph=True, dynamic=False)
        yield from _time_small("ours, compiled", num_tokens, compiled, (q, k, v), dout)
        whole, heads = [[0, num_tokens]], (NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM)
        key = magi_attn_flex_key(whole, whole, "causal", num_tokens, num_tokens, *heads, chunk_size=num_tokens)
        yield from _time_small("calc_attn", num_tokens, partial(_calc_attn, key), (q, k, v), dout)
        batched = tuple(x.detach().transpose(0, 1)[None].contiguous().requires_grad_() for x in (q, k, v))
        batched_dout = dout.transpose(0, 1)[None].contiguous()
        for kind, chosen in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            yield from _time_small(f"sdpa {kind}", num_tokens, partial(_sdpa, chosen), batched, batched_dout)


def _attend(ranges: Tensor, types: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_flash_attn_func(q, k, v, ranges, ranges, types)[0]


def _calc_attn(key: DistAttnRuntimeKey, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one rank, whose plan knows the mask: a graph makes no lists of it."""
    return calc_attn(q, k, v, key)[0]


def _sdpa(chosen: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(chosen):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _time_small(
    method: str, num_tokens: int, attend: Callable[..., Tensor], leaves: tuple[Tensor, ...], dout: Tensor
) -> Iterator[Row]:
    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    calls: dict[str, Call] = {"forward": forward, "forward and backward": both}
    for what, call in calls.items():
        row: Row = {"table": "small", "tokens": num_tokens, "what": what, "method": method}
        try:
            row["host_us"] = host_microseconds(call)
            row["eager_us"] = timed(call) * 1e3
            row["device_us"] = device_microseconds(call)
        except Exception as error:  # a method that cannot run, or cannot be captured, is a row that says so
            row["error"] = f"{type(error).__name__}: {str(error)[:100]}"
            torch.cuda.synchronize()
        yield row


def lists() -> Iterator[Row]:
    """One row a number of documents and place: a forward and backward of a new mask, less those of a known one."""
    for num_tokens, num_documents in ((8192, 16), (32768, 256), (131072, 2048)):
        yield from _time_lists(num_tokens, num_documents)


def _time_lists(num_tokens: int, num_documents: int) -> Iterator[Row]:
    q, k, v, dout = (normal(num_tokens, heads, HEAD_DIM) for heads in (2, 1, 1, 2))
    ranges, types = causal_documents(num_tokens, num_documents)
    host_ranges, host_types = (x.cpu().numpy().astype(np.int64) for x in (ranges, types))
    settings = AttnSettings(softmax_scale=HEAD_DIM**-0.5)
    backend = pick(q, k, v, settings)

    def on_device() -> KernelMask:
        return DeviceMask(ranges, ranges, types, num_tokens, num_tokens)

    def on_host() -> KernelMask:
        return KernelMask(bands_from_slices(host_ranges, host_ranges, host_types), num_tokens, num_tokens)

    out, lse, _ = backend.forward(q, k, v, on_host(), settings, out_dtype=q.dtype)
    delta = row_dots(out, dout)

    def attend(mask: KernelMask) -> None:
        backend.forward(q, k, v, mask, settings, out_dtype=q.dtype)
        backend.backward(dout, q, k, v, lse, delta, mask, settings, grad_dtype=q.dtype)

    made: dict[str, Callable[[], KernelMask]] = {"device": on_device, "host": on_host}
    for where, make in made.items():
        mask, renewed = make(), partial(_renewed, attend, make)
        known, new = timed(partial(attend, mask)), timed(renewed)
        yield {
            "table": "lists", "tokens": num_tokens, "documents": num_documents, "method": where,
            "known_us": known * 1e3, "new_us": new * 1e3, "host_us": host_microseconds(renewed),
        }  # fmt: skip


def _renewed(attend: Callable[[KernelMask], None], make: Callable[[], KernelMask]) -> None:
    attend(make())


def rows() -> Iterator[Row]:
    """One row a kernel: bytes that it must read and write, over its time, and as a share of what a copy reaches."""
    _, copy = ceilings()
    num_rows, heads, dim = 1 << 16, 8, 128
    source = normal(num_rows, heads, dim)
    into, lse = source.float(), torch.randn(num_rows, heads, device="cuda")
    # Every other run of 128 rows, twice: as a chunk that two ranks need, or that two give back.
    runs = torch.arange(num_rows, device="cuda").view(-1, 128)[::2].reshape(-1)
    index = torch.cat([runs, runs])
    arrived, arrived_lse = normal(len(index), heads, dim), torch.randn(len(index), heads, device="cuda")
    view = torch.empty_like(arrived)
    places = torch.arange(len(index), device="cuda").view(2, -1).t().reshape(-1)
    owners = Owners(runs, torch.arange(0, len(index) + 1, 2, device="cuda"), places)
    moved = arrived.nbytes
    wide = len(runs) * heads * dim * 4 * 2  # what the owners' rows are read and written as
    calls: dict[str, tuple[Call, int]] = {
        "gather": (lambda: gather_rows_into(view, source, index), 2 * moved),
        "sum": (lambda: sum_rows_(into, arrived, owners), moved + wide),
        "merge": (lambda: merge_rows_(into, lse, arrived, arrived_lse, owners), moved + wide + 2 * arrived_lse.nbytes),
    }
    for what, (call, num_bytes) in calls.items():
        ms = timed(call)
        rate = num_bytes / ms / 1e9
        yield {"table": "rows", "what": what, "ms": ms, "tb_per_s": rate, "share_of_copy": rate / copy, "copy": copy}


TABLES: dict[str, Callable[[], Iterator[Row]]] = {"small": small, "lists": lists, "rows": rows}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="left out: all")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures GPUs, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    made: list[Row] = []
    for name in args.tables or TABLES:
        for row in TABLES[name]():
            made.append(row)
            cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            print("  ".join(f"{key} {cell}" for key, cell in zip(row, cells, strict=True)), flush=True)
    if args.csv is not None:
        fields = list(dict.fromkeys(key for row in made for key in row))
        write_csv(args.csv, fields, made)


if __name__ == "__main__":
    main()
