"""Attention over listed blocks of keys: lists that differ between kv heads become tables of ranges, one for each kv head.

Each kv head is a call of its own, of its query heads. This is right, not fast: a kernel that reads the lists is an issue of its own.

Shapes: num_q, num_k tokens; hk kv heads; num_blocks_q blocks of queries; topk blocks of keys listed for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from magi_attention import env
from magi_attention.common.tensor_kinds import has_no_values
from magi_attention.functional.masks import Tables, is_capturing
from magi_attention.mask.blocks import check_indices, check_listed_once, in_tokens, runs_of_indices
from magi_attention.mask.cells import stack_runs
from magi_attention.mask.inputs import check_length

# Rows of the table of one kv head: more take longer to make than attention would.
MOST_ROWS = 4_000_000

Attend = Callable[[Tensor, Tensor, Tensor, Tables, Tensor | None], tuple[Tensor, Tensor, Tensor]]

# By the tensor of indices itself: (its version and what else was given, tables). Gone when it is.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def attend_listed_blocks(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, indices: Tensor, block_sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend(q, k, v, tables, sink)`` for each kv head and its query heads: ``(out, lse, max_logits)`` of all.

    Raises:
        ValueError: ``indices`` are none, see `tables_of_indices`.
    """
    num_heads_kv = k.shape[1]
    tables = tables_of_indices(indices, block_sizes, q.shape[0], k.shape[0], num_heads_kv, q.device)
    if len(tables) == 1:
        return attend(q, k, v, tables[0], sink)
    group = q.shape[1] // num_heads_kv
    sinks = [None] * num_heads_kv if sink is None else sink.split(group, dim=-1)
    parts = [
        attend(*heads)
        for heads in zip(q.split(group, dim=1), k.split(1, dim=1), v.split(1, dim=1), tables, sinks, strict=True)
    ]
    outs, lses, max_logits = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1), torch.cat(max_logits)


def tables_of_indices(
    indices: Tensor, block_sizes: tuple[int, int], num_q: int, num_k: int, num_heads_kv: int, device: torch.device
) -> list[Tables]:
    """``(q_ranges, k_ranges, None)`` ``[n, 2]`` int32 for each kv head; one for all where all list the same.

    The lists are read and checked on the host, which waits for the device; adjacent blocks are merged, and equal runs of adjacent
    query blocks. What is made is kept for as long as the tensor is, until something is written to it. In a graph (compiled, or a CUDA
    graph) nothing is read: each entry becomes a row.

    Raises:
        ValueError: ``indices`` are not int32 ``[num_blocks_q, num_heads_kv, topk]`` on the device, a block that does not exist, padding
            before a block, more than ``MOST_ROWS`` rows; with ``MAGI_ATTENTION_SANITY_CHECK``, a block that is listed twice.
    """
    sizes = (check_length(block_sizes[0], "q_block_size", 1), check_length(block_sizes[1], "k_block_size", 1))
    _check_shape(indices, -(-num_q // sizes[0]), num_heads_kv, device)
    if torch.compiler.is_compiling() or has_no_values(indices) or is_capturing(device):
        return _unread_tables(indices, sizes, num_q, num_k)
    key: tuple[Any, ...] | None = None
    if not indices.is_inference():  # whose writes are not counted
        key = (indices._version, sizes, num_q, num_k, env.sanity_check())
        kept: tuple[Any, list[Tables]] | None = _kept.get(indices)
        if kept is not None and kept[0] == key:
            return kept[1]
    tables = _read_tables(indices, sizes, num_q, num_k)
    if key is not None:
        _kept[indices] = (key, tables)
    return tables


def _check_shape(indices: Tensor, num_blocks_q: int, num_heads_kv: int, device: torch.device) -> None:
    if (
        not isinstance(indices, Tensor)
        or indices.dtype != torch.int32
        or indices.dim() != 3
        or indices.shape[:2] != (num_blocks_q, num_heads_kv)
    ):
        got = (
            f"shape {list(indices.shape)} of {indices.dtype}"
            if isinstance(indices, Tensor)
            else f"a {type(indices).__name__}"
        )
        raise ValueError(
            f"index_attn_indices must be int32 [{num_blocks_q}, {num_heads_kv}, topk]: for each block of queries and kv head, the blocks "
            f"of keys that it attends, -1 at the end as padding; got {got}"
        )
    if indices.device != device:
        raise ValueError(f"index_attn_indices must be on q's device {device}, got {indices.device}")


def _read_tables(indices: Tensor, sizes: tuple[int, int], num_q: int, num_k: int) -> list[Tables]:
    lists = indices.detach().cpu().numpy()
    check_indices(lists, -(-num_k // sizes[1]), "index_attn_indices")
    if env.sanity_check():
        check_listed_once(lists, "index_attn_indices")
    num_heads = 1 if (lists == lists[:, :1]).all() else lists.shape[1]
    return [_table_of_head(lists[:, head], sizes, num_q, num_k, indices.device) for head in range(num_heads)]


def _table_of_head(
    lists: np.ndarray[Any, Any], sizes: tuple[int, int], num_q: int, num_k: int, device: torch.device
) -> Tables:
    rows = in_tokens(stack_runs(*runs_of_indices(lists)), sizes, (num_q, num_k))
    _check_num_rows(len(rows))
    table = torch.from_numpy(rows[:, :4].astype(np.int32)).to(device)
    return table[:, :2].contiguous(), table[:, 2:].contiguous(), None


def _unread_tables(indices: Tensor, sizes: tuple[int, int], num_q: int, num_k: int) -> list[Tables]:
    """A row for each entry, made on the device; padding is an empty range, and so is a block behind the last."""
    num_blocks_q, num_heads_kv, topk = indices.shape
    _check_num_rows(num_blocks_q * topk)
    starts = torch.arange(num_blocks_q, dtype=torch.int32, device=indices.device) * sizes[0]
    q_ranges = torch.stack([starts, (starts + sizes[0]).clamp(max=num_q)], dim=1)
    q_ranges = q_ranges.unsqueeze(1).expand(-1, topk, -1).reshape(-1, 2)
    # [num_blocks_q, hk, topk, 2]
    edges = torch.stack([indices * sizes[1], indices * sizes[1] + sizes[1]], dim=-1).clamp(0, num_k)
    return [(q_ranges, edges[:, head].reshape(-1, 2), None) for head in range(num_heads_kv)]


def _check_num_rows(num_rows: int) -> None:
    if num_rows > MOST_ROWS:
        raise ValueError(
            f"index_attn_indices make {num_rows:,} ranges of keys for a kv head, more than the {MOST_ROWS:,} that are taken; use larger "
            "blocks (q_block_size, k_block_size), fewer blocks for each list, or lists whose blocks are adjacent"
        )
