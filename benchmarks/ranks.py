"""Distributed attention as it runs: ``python benchmarks/ranks.py``, on all GPUs there are (NCCL), or with gloo on two ranks of this CPU.

For each mask and number of stages, milliseconds of a forward and of a backward pass, of the slowest rank:

    total     as `calc_attn` runs it
    compute   its kernels alone, on rows that are already there
    moving    its exchanges alone, one after the other
    hidden    how much of the smaller of the two the larger one covers: (compute + moving - total) / min(compute, moving)

Beside it the same on one rank (all of the sequence), and a gather of all keys and values before one kernel, its usual alternative. What is
computed is checked against the one rank. A pass is one of several in a row, as layers are, so that what the host does is hidden where
the device has enough to do; ranks begin each row together, and numbers are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.api import calc_attn, clear_cache, dispatch, magi_attn_flex_key
from magi_attention.comm import all_reduce_max
from magi_attention.comm.shards import gather_rows
from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.kernels.interface import AttnSettings, KernelMask
from magi_attention.kernels.registry import pick
from magi_attention.kernels.row_dots import row_dots
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import shift, split_q
from magi_attention.runtime.cache import get_session
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.runtime.transport import cast_keys, reduce_gradients
from magi_attention.testing.dist import run_ranks
from plan import document_lengths
from tables import write_csv

NUM_REPEATS, NUM_IN_A_ROW = 7, 6


@dataclass(frozen=True)
class Setting:
    """What is measured, the same on every rank."""

    num_tokens: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    dtype: torch.dtype
    device: str
    degrees: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Milliseconds of the slowest rank; ``stages`` 0: all keys gathered first. ``error``: the largest, of out, against one rank."""

    mask: str
    stages: int
    forward: float
    backward: float
    forward_compute: float
    forward_moving: float
    backward_compute: float
    backward_moving: float
    one_rank_forward: float
    one_rank_backward: float
    rows_received: int
    error: float


def masks(total: int) -> dict[str, AttnMask]:
    """Whose work and needs differ: one document, packed ones, a window."""
    lengths = document_lengths(total, mean=total / 12)
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return {
        "causal": AttnMask.causal(total),
        "varlen causal": AttnMask.varlen(edges, causal=True),
        "window": AttnMask.sliding_window(total, (total // 16, 0)),
    }


class Measured:
    """One mask on this rank: inputs, and what is timed of them."""

    def __init__(self, mask: AttnMask, setting: Setting, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.mask, self.setting, self.group, self.device = mask, setting, group, device
        generator = torch.Generator().manual_seed(0)
        heads = (setting.num_heads_q, setting.num_heads_kv, setting.num_heads_kv, setting.num_heads_q)
        self.whole = [
            torch.randn(setting.num_tokens, h, setting.head_dim, generator=generator).to(device, setting.dtype)
            for h in heads
        ]  # q, k, v, dout
        self.settings = AttnSettings(softmax_scale=setting.head_dim**-0.5)
        self.backend = pick(*self.whole[:3], self.settings)

    def key(self, degree: int, group: dist.ProcessGroup | None) -> DistAttnRuntimeKey:
        """Of this mask, in ``degree`` stages."""
        overlap = OverlapConfig(mode=AttnOverlapMode.STATIC, degree=degree, min_chunk_size=64)
        q_ranges, k_ranges, types = self.mask.to_slices()
        total, setting = self.mask.num_q, self.setting
        return magi_attn_flex_key(
            q_ranges.tolist(), k_ranges.tolist(), [("full", "causal", "inv_causal", "bi_causal")[t] for t in types],
            total, total, setting.num_heads_q, setting.num_heads_kv, setting.head_dim,
            cp_group_or_mesh=group, dist_attn_config=DistAttnConfig(overlap_config=overlap),
        )  # fmt: skip

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call: the median over repeats of the slowest rank's time."""
        found = []
        for _ in range(2 + NUM_REPEATS):
            self._meet()
            start = time.perf_counter()
            for _ in range(NUM_IN_A_ROW):
                call()
            self._synchronize()
            found.append((time.perf_counter() - start) / NUM_IN_A_ROW)
        slowest = all_reduce_max(torch.tensor(found[2:], dtype=torch.float64, device=self.device), self.group)
        return statistics.median(slowest.tolist())

    def _meet(self) -> None:
        self._synchronize()
        if self.group is not None:
            all_reduce_max(torch.zeros(1, device=self.device), self.group)
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def passes(self, attend: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[float, float, Tensor]:
        """Seconds of a forward and of a backward pass of ``attend(q, k, v)``, and its output."""
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attend(*leaves)
        with torch.no_grad():
            forward = self.seconds(lambda: attend(*leaves))
        backward = self.seconds(lambda: torch.autograd.grad(out, leaves, tensors[3], retain_graph=True))
        return forward, backward, out.detach()

    def alone(self) -> tuple[float, float, Tensor]:
        """The whole sequence on one rank; every rank does it."""
        key = self.key(1, None) if self.group is None else self._key_of_one()
        return self.passes(lambda q, k, v: calc_attn(q, k, v, key)[0], self.whole)

    def _key_of_one(self) -> DistAttnRuntimeKey:
        groups = [dist.new_group([rank], backend=dist.get_backend(self.group)) for rank in range(dist.get_world_size())]
        return self.key(1, groups[dist.get_rank()])

    def distributed(self, degree: int) -> tuple[list[float], Tensor, Tensor, int]:
        """``([forward, backward, and of each computing and moving alone], local out, its global rows, rows received)``."""
        key = self.key(degree, self.group)
        local = [dispatch(x, key) for x in self.whole]
        forward, backward, out = self.passes(lambda q, k, v: calc_attn(q, k, v, key)[0], local)
        parts = [self.seconds(call) for call in self._parts(key, local)]
        plan = get_session(key).plan
        positions = torch.from_numpy(plan.q_layout.positions(key.cp_rank))
        return [forward, backward, *parts], out, positions, int(plan.received_rows.sum())

    def _parts(self, key: DistAttnRuntimeKey, local: list[Tensor]) -> list[Callable[[], object]]:
        """Forward kernels, forward exchanges, backward kernels, backward exchanges."""
        session, backend, settings = get_session(key), self.backend, self.settings
        q, k, v, dout = local
        part, wide = session.rank_plan, torch.float32
        out, meta = calc_attn(q, k, v, key)
        delta = row_dots(out, dout)
        arrived = [cast_keys((k, v), stage, self.group, "k/v").wait() for stage in part.stages]
        given = [cast_keys((k, v), stage, self.group, "k/v").wait() for stage in part.backward_stages]

        def forward_kernels() -> None:
            result = backend.forward(q, k, v, session.host_mask, settings, out_dtype=wide)
            for mask, (stage_k, stage_v) in zip(session.stage_masks, arrived, strict=True):
                backend.forward(q, stage_k, stage_v, mask, settings, into=result)

        def backward_kernels() -> None:
            dq, _, _ = backend.backward(dout, q, k, v, meta.lse, delta, session.host_mask, settings, grad_dtype=wide)
            for mask, (stage_k, stage_v) in zip(session.backward_stage_masks, given, strict=True):
                backend.backward(dout, q, stage_k, stage_v, meta.lse, delta, mask, settings, dq=dq, grad_dtype=q.dtype)

        def forward_exchanges() -> None:
            for stage in part.stages:
                cast_keys((k, v), stage, self.group, "k/v").wait()

        def backward_exchanges() -> None:
            into = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v)]
            for stage, rows in zip(part.backward_stages, given, strict=True):
                cast_keys((k, v), stage, self.group, "k/v").wait()
                reduce_gradients(rows, into, stage, self.group, q.dtype, "dk/dv").wait()

        return [forward_kernels, forward_exchanges, backward_kernels, backward_exchanges]

    def gathered(self) -> float:
        """Seconds of a forward pass that gathers all keys and values first."""
        key = self.key(1, self.group)
        q, k, v, _ = (dispatch(x, key) for x in self.whole)
        session, layout = get_session(key), get_session(key).plan.k_layout
        order = torch.cat([torch.from_numpy(layout.positions(rank)) for rank in range(key.cp_size)])
        in_sequence = torch.argsort(order).to(self.device)
        counts = [int(rows) for rows in layout.num_rows]
        own = session.plan.q_layout.rank_runs(key.cp_rank)
        pieces, _, run = split_q(self.mask.bands, own[:, 0], own[:, 1])
        bands = shift(pieces, own[run, 3] - own[run, 0], 0)
        kernel_mask = KernelMask(bands, len(q), sum(counts))

        def attend() -> Tensor:
            whole_k, whole_v = (gather_rows(x, counts, self.group)[in_sequence] for x in (k, v))
            return self.backend.forward(q, whole_k, whole_v, kernel_mask, self.settings, out_dtype=q.dtype).out

        return self.seconds(attend)


def measure(setting: Setting, names: list[str]) -> list[Row]:
    """On every rank; all return the same."""
    device, group = torch.device("cpu"), dist.group.WORLD
    if setting.device == "cuda":
        device = torch.device("cuda", dist.get_rank())
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
    rows = []
    for name in names:
        measured = Measured(masks(setting.num_tokens)[name], setting, group, device)
        alone_forward, alone_backward, truth = measured.alone()
        alone = {"one_rank_forward": 1e3 * alone_forward, "one_rank_backward": 1e3 * alone_backward}
        unknown = float("nan")
        gather = Row(name, 0, 1e3 * measured.gathered(), *[unknown] * 5, **alone, rows_received=0, error=unknown)
        rows.append(gather)
        for degree in setting.degrees:
            seconds, out, positions, received = measured.distributed(degree)
            is_real = positions < setting.num_tokens
            error = (out[is_real.to(device)] - truth[positions[is_real].to(device)]).abs().max().float().reshape(1)
            error = all_reduce_max(error, group).item()
            times = [1e3 * second for second in seconds]
            rows.append(Row(name, degree, *times[:2], *times[2:], **alone, rows_received=received, error=error))
        clear_cache()
    return rows


def hidden(row: Row, way: str) -> float:
    """See the top of this file."""
    total, compute, moving = getattr(row, way), getattr(row, f"{way}_compute"), getattr(row, f"{way}_moving")
    return float((compute + moving - total) / max(min(compute, moving), 1e-9))


def show(rows: list[Row], num_ranks: int) -> None:
    """The table."""
    print(
        f"{'mask':<14}{'stages':>7} | {'forward':>8}{'compute':>8}{'moving':>8}{'hidden':>8}{'speed-up':>9} | "
        f"{'backward':>8}{'compute':>8}{'moving':>8}{'hidden':>8}{'speed-up':>9} | {'rows':>8}{'error':>9}"
    )
    for row in rows:
        head = f"{row.mask:<14}{row.stages or 'gather':>7} | {row.forward:>8.2f}"
        if not row.stages:
            print(f"{head}{'':>24}{row.one_rank_forward / row.forward:>8.2f}x |")
            continue
        line = f"{row.forward_compute:>8.2f}{row.forward_moving:>8.2f}{hidden(row, 'forward'):>8.0%}"
        line += f"{row.one_rank_forward / row.forward:>8.2f}x | {row.backward:>8.2f}{row.backward_compute:>8.2f}"
        line += (
            f"{row.backward_moving:>8.2f}{hidden(row, 'backward'):>8.0%}{row.one_rank_backward / row.backward:>8.2f}x"
        )
        print(f"{head}{line} | {row.rows_received:>8,}{row.error:>9.1e}")
    print(f"milliseconds; speed-up over one rank, at most {num_ranks}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="left out, one for each GPU, or two")
    parser.add_argument("--tokens", type=int, help="of the whole sequence; left out, 16,384 a GPU, or 4,096")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4], help="numbers of stages")
    parser.add_argument("--masks", nargs="+", default=list(masks(4096)), choices=list(masks(4096)))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    num_ranks = args.ranks or (torch.cuda.device_count() if on_gpu else 2)
    if on_gpu and torch.cuda.device_count() < num_ranks:
        parser.error(f"NCCL needs a GPU for each rank; there are {torch.cuda.device_count()} for {num_ranks}")
    setting = Setting(
        num_tokens=args.tokens or (16384 * num_ranks if on_gpu else 4096),
        num_heads_q=32 if on_gpu else 8,
        num_heads_kv=8 if on_gpu else 2,
        head_dim=128 if on_gpu else 64,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        device=args.device,
        degrees=tuple(args.degrees),
    )
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(
        f"{num_ranks} ranks, {where}, {'NCCL' if on_gpu else 'gloo'}, torch {torch.__version__}: {setting.num_tokens:,} tokens, "
        f"{setting.num_heads_q} q and {setting.num_heads_kv} kv heads, head_dim {setting.head_dim}, {setting.dtype}",
        flush=True,
    )
    rows = run_ranks(measure, num_ranks, setting, args.masks, timeout=1800)[0]
    show(rows, num_ranks)
    if args.csv is not None:
        write_csv(args.csv, list(asdict(rows[0])), map(asdict, rows))


if __name__ == "__main__":
    main()
