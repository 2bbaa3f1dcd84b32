"""What a caller of one-device attention can get wrong, found before any tensor moves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from magi_attention.functional.sink import SINK_LAYOUTS
from magi_attention.mask.bands import Ints

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where q, k and v do not fit each other."""
    for name, x, layout in (
        ("q", q, "[num_tokens_q, num_heads_q, head_dim]"),
        ("k", k, "[num_tokens_k, num_heads_kv, head_dim]"),
        ("v", v, "[num_tokens_k, num_heads_kv, head_dim_v]"),
    ):
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{name} must be {layout}: tokens are packed, there is no batch axis; got {_describe(x)}")
        if 0 in x.shape[1:]:
            raise ValueError(
                f"{name} must have at least one head and a head_dim of at least 1, got shape {list(x.shape)}"
            )
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k and v must agree in tokens and heads, got k {list(k.shape)} and v {list(v.shape)}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have one head_dim (only v may have another), got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"num_heads_q must be a multiple of num_heads_kv, since each key/value head serves equally many query heads; got "
            f"{q.shape[1]} and {k.shape[1]}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            "q, k and v must have one dtype out of float16, bfloat16, float32 and float64, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}; convert them first"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_sink(sink: Tensor | None, layout: str, q: Tensor) -> None:
    """ValueError where the sink is not of its layout."""
    if layout not in SINK_LAYOUTS:
        raise ValueError(f"sink_layout must be 'sh' or 'ssh', got {layout!r}")
    if sink is None:
        return
    num_q, num_heads_q, _ = q.shape
    wanted = f"[num_sink, {num_heads_q}]" if layout == "sh" else f"[{num_q}, num_sink, {num_heads_q}]"
    fits = isinstance(sink, Tensor) and sink.dim() == len(layout) and sink.shape[-1] == num_heads_q
    if not fits or (layout == "ssh" and sink.shape[0] != num_q):
        raise ValueError(f"sink must be {wanted} under sink_layout={layout!r}, got {_describe(sink)}")
    if sink.dtype not in _DTYPES:
        raise ValueError(f"sink must be a floating-point tensor, got {sink.dtype}")
    if sink.device != q.device:
        raise ValueError(f"sink must be on q's device {q.device}, got {sink.device}")


def check_one_mask(
    q_ranges: object, k_ranges: object, attn_type_map: object, mask: object, index_attn_indices: object
) -> None:
    """ValueError unless what is attended is given in one way: by ranges, by a mask, or by the indices of blocks."""
    if q_ranges is not None and k_ranges is not None and mask is None and index_attn_indices is None:
        return
    ranges = {"q_ranges": q_ranges, "k_ranges": k_ranges, "attn_type_map": attn_type_map}
    given = {**ranges, "mask": mask, "index_attn_indices": index_attn_indices}
    names = [name for name, value in given.items() if value is not None]
    if names not in (["q_ranges", "k_ranges"], [*ranges], ["mask"], ["index_attn_indices"]):
        raise ValueError(
            "what is attended must be given in one way: q_ranges and k_ranges (with or without attn_type_map), or mask, or "
            f"index_attn_indices; got {' and '.join(names) or 'none of them'}"
        )


def check_tables(
    q_ranges: Tensor | None, k_ranges: Tensor | None, attn_type_map: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tables; ValueError where they are none, whatever they say: they are not read."""
    assert q_ranges is not None and k_ranges is not None, "check_one_mask comes first"
    for name, ranges in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        _check_table(name, ranges, "[n, 2]", device)
        if ranges.dim() != 2 or ranges.shape[1] != 2:
            raise ValueError(f"{name} must be [n, 2], a (start, end) for each slice, got {_describe(ranges)}")
    if attn_type_map is not None:
        _check_table("attn_type_map", attn_type_map, "[n]", device)
    if len(q_ranges) != len(k_ranges) or (attn_type_map is not None and attn_type_map.shape != (len(q_ranges),)):
        types = "" if attn_type_map is None else f" and attn_type_map {list(attn_type_map.shape)}"
        raise ValueError(
            "a slice is one q range, one k range and one type, so their lists must be of one length; got "
            f"q_ranges {list(q_ranges.shape)}, k_ranges {list(k_ranges.shape)}{types}"
        )
    return q_ranges, k_ranges, attn_type_map


def read_slices(
    q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None, num_q: int, num_k: int
) -> tuple[Ints, Ints, Ints]:
    """``(q_ranges [n, 2], k_ranges [n, 2], types [n])`` int64 on the host; ValueError where they are no mask of these lengths.

    On a device that is not the host, waits for it.
    """
    q_table, k_table = _to_host(q_ranges), _to_host(k_ranges)
    types_table = np.zeros(len(q_table), np.int64) if attn_type_map is None else _to_host(attn_type_map)
    _check_bounds("q_ranges", q_table, num_q, "num_tokens_q")
    _check_bounds("k_ranges", k_table, num_k, "num_tokens_k")
    unknown = np.flatnonzero((types_table < 0) | (types_table > 3))
    if len(unknown):
        raise ValueError(
            "attn_type_map must hold 0 (full), 1 (causal), 2 (inv_causal) or 3 (bi_causal), got "
            f"{types_table[unknown[0]]} at {unknown[0]}"
        )
    return q_table, k_table, types_table


def _check_table(name: str, table: Tensor, layout: str, device: torch.device) -> None:
    if not isinstance(table, Tensor) or table.dtype != torch.int32:
        raise ValueError(
            f"{name} must be an int32 tensor {layout}, got {_describe(table)}; make it with dtype=torch.int32"
        )
    if table.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {table.device}")


def _check_bounds(name: str, ranges: Ints, length: int, length_name: str) -> None:
    bad = np.flatnonzero((ranges[:, 0] < 0) | (ranges[:, 0] > ranges[:, 1]) | (ranges[:, 1] > length))
    if len(bad):
        start, end = ranges[bad[0]].tolist()
        raise ValueError(
            f"{name}[{bad[0]}] must satisfy 0 <= start <= end <= {length} ({length_name}), got [{start}, {end})"
        )


def _to_host(table: Tensor) -> Ints:
    host: Ints = table.detach().cpu().numpy().astype(np.int64)
    return host


def _describe(x: object) -> str:
    return f"shape {list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
