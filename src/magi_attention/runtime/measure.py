"""What computing and moving cost here, measured: the three numbers by which the planner weighs one against the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from magi_attention import env
from magi_attention.comm import all_reduce_max, group_cast
from magi_attention.comm.transport import group_device, group_rank, group_size
from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import OverlapConfig
from magi_attention.kernels.interface import AttnSettings, KernelMask
from magi_attention.kernels.registry import pick
from magi_attention.mask import full
from magi_attention.plan import Exchange
from magi_attention.plan.cost import CostModel
from magi_attention.runtime.group import resolve_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NUM_REPEATS = 7
# Long enough that launching a kernel and opening a connection are a small part, short enough to wait for.
_NUM_TOKENS_CUDA, _NUM_TOKENS_ELSEWHERE = 8192, 1024


@dataclass(frozen=True)
class _Shape:
    """What was measured: rows of ``num_heads_q`` and ``num_heads_kv`` heads, ``num_tokens`` of them."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    num_tokens: int
    backend: str


_measured: dict[tuple[dist.ProcessGroup | None, _Shape], CostModel] = {}


def measure_cost_factors(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    num_tokens: int | None = None,
    overlap_config: OverlapConfig | None = None,
) -> OverlapConfig:
    """Measure what computing and moving cost on these ranks, for `OverlapConfig` to choose the number of stages by.

    A collective: every rank of the group must call it, with the same arguments. Every rank gets the same numbers, those of the slowest,
    so that all make the same plans. Measured once for a group and a shape, then remembered. In a group of one no row travels, and the
    numbers are what copying it costs.

    Args:
        num_heads_q, num_heads_kv, head_dim: of the tensors that `calc_attn` will be given.
        cp_group_or_mesh: as for `magi_attn_flex_key`.
        dtype: of those tensors.
        device: where they are; omitted, the current GPU where there is one, the CPU otherwise.
        num_tokens: rows that are computed with and moved; omitted, 8,192 on a GPU and 1,024 elsewhere.
        overlap_config: whose other fields are kept; omitted, one that chooses the number of stages (`AttnOverlapMode.DYNAMIC`).

    Returns:
        ``overlap_config`` with ``calc_cost_factor`` (of an attended cell, all heads, forward), ``comm_cost_factor`` (of a row of keys and
        values, all heads) and ``latency_cost`` (of an exchange) in seconds.

    Raises:
        ValueError: numbers of heads, a length or a dtype that attention does not take.
    """
    group = resolve_group(cp_group_or_mesh)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if num_tokens is None:
        num_tokens = _NUM_TOKENS_CUDA if device.type == "cuda" else _NUM_TOKENS_ELSEWHERE
    if min(num_heads_q, num_heads_kv, head_dim, num_tokens) < 1 or num_heads_q % num_heads_kv:
        raise ValueError(
            "num_heads_q must be a multiple of num_heads_kv, and they, head_dim and num_tokens positive, got "
            f"{num_heads_q}, {num_heads_kv}, {head_dim} and {num_tokens}"
        )
    at = (group, _Shape(num_heads_q, num_heads_kv, head_dim, dtype, device, num_tokens, env.backend()))
    if at not in _measured:
        _measured[at] = _measure(*at)
    cost = _measured[at]
    given = overlap_config or OverlapConfig(mode=AttnOverlapMode.DYNAMIC)
    return replace(given, calc_cost_factor=cost.cell, comm_cost_factor=cost.row, latency_cost=cost.latency)


@torch.no_grad()
def _measure(group: dist.ProcessGroup | None, shape: _Shape) -> CostModel:
    """The slowest rank's costs, in seconds."""
    peers = max(1, group_size(group) - 1)
    per_peer = max(2, shape.num_tokens // peers)
    few, many = (_time_exchange(num_rows, group, shape) for num_rows in (1, per_peer))
    own = torch.tensor([_time_cell(shape), few, many], dtype=torch.float64)
    if group is not None:
        own = own.to(group_device(group))
    cell, few, many = all_reduce_max(own, group, label="measured costs").cpu().tolist()
    if many <= few:  # noise is larger than what rows cost: no row costs more than its share of all the time
        return CostModel(cell=cell, row=many / (per_peer * peers), latency=few)
    row = (many - few) / ((per_peer - 1) * peers)
    return CostModel(cell=cell, row=row, latency=max(few - row * peers, 0.0))


def _time_cell(shape: _Shape) -> float:
    """Seconds of an attended cell."""
    q = _rows(shape.num_tokens, shape.num_heads_q, shape)
    k, v = (_rows(shape.num_tokens, shape.num_heads_kv, shape) for _ in range(2))
    settings = AttnSettings(softmax_scale=shape.head_dim**-0.5)
    backend = pick(q, k, v, settings, shape.backend)
    mask = full(shape.num_tokens)
    kernel_mask = KernelMask(mask.bands, mask.num_q, mask.num_k)
    return _time(lambda: backend.forward(q, k, v, kernel_mask, settings), shape.device) / mask.area


def _time_exchange(num_rows: int, group: dist.ProcessGroup | None, shape: _Shape) -> float:
    """Seconds of an exchange in which every rank sends ``num_rows`` rows of keys and values to each other; a rank alone, to itself."""
    size, rank = group_size(group), group_rank(group)
    splits = tuple(num_rows if size == 1 or peer != rank else 0 for peer in range(size))
    exchange = Exchange(np.array([[0, num_rows]] * max(1, size - 1), np.int64), splits, splits)
    k, v = (_rows(num_rows, shape.num_heads_kv, shape) for _ in range(2))
    return _time(lambda: group_cast((k, v), exchange, group, label="measuring").wait(), shape.device)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after two that do not count: they compile, allocate and connect."""
    times = []
    for _ in range(2 + _NUM_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(num_rows: int, num_heads: int, shape: _Shape) -> torch.Tensor:
    return torch.randn(num_rows, num_heads, shape.head_dim, device=shape.device, dtype=shape.dtype)
