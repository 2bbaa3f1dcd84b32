"""Lists of key blocks and masks in place of ranges, against the float64 oracle of each kv head.

Shapes: num_q, num_k tokens; hq, hk heads; d head dim.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.functional import flex_flash_attn_func, index_attn, masks
from magi_attention.functional.index_attn import attend_listed_blocks, tables_of_indices
from magi_attention.mask import AttnMask
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

NUM_Q, NUM_K, HEADS_KV, GROUP, DIM = 50, 70, 2, 3, 16
SIZES = [(1, 1), (8, 8), (16, 5), (1, 64), (64, 128)]


def random_lists(seed: int, sizes: tuple[int, int], num_heads: int = HEADS_KV) -> Tensor:
    """Blocks in any order, lists of any length, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks_q, num_blocks_k = -(-NUM_Q // sizes[0]), -(-NUM_K // sizes[1])
    lists = torch.full((num_blocks_q, num_heads, num_blocks_k), -1, dtype=torch.int32)
    for block in range(num_blocks_q):
        for head in range(num_heads):
            count = int(torch.randint(0, num_blocks_k + 1, (), generator=generator))
            lists[block, head, :count] = torch.randperm(num_blocks_k, generator=generator)[:count].int()
    return lists


def attended(lists: Tensor, sizes: tuple[int, int]) -> Tensor:
    """``[hk, num_q, num_k]`` bool, one entry at a time."""
    dense = torch.zeros(lists.shape[1], NUM_Q, NUM_K, dtype=torch.bool)
    for block, head, place in (lists >= 0).nonzero().tolist():
        entry = int(lists[block, head, place])
        dense[head, block * sizes[0] : (block + 1) * sizes[0], entry * sizes[1] : (entry + 1) * sizes[1]] = True
    return dense


def make_tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q``, ``k``, ``v``, ``dout`` and two sinks."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((NUM_Q, HEADS_KV * GROUP, DIM), (NUM_K, HEADS_KV, DIM), (NUM_K, HEADS_KV, DIM + 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    dout = torch.randn((NUM_Q, HEADS_KV * GROUP, DIM + 8), generator=generator).to(dtype)
    return q, k, v, dout, torch.randn((2, HEADS_KV * GROUP), generator=generator)


def solve(solver: Any, dense: Tensor, sink: Tensor | None, sink_layout: str = "sh", **options: Any) -> AttnResult:
    """What ``solver`` finds for each kv head, side by side."""
    q, k, v, dout, _ = make_tensors(options.pop("inputs"))
    parts = []
    for head in range(HEADS_KV):
        of_q = slice(head * GROUP, (head + 1) * GROUP)
        mine = None if sink is None else sink[..., of_q]
        tensors = (q[:, of_q], k[:, head : head + 1], v[:, head : head + 1], dense[head])
        parts.append(solver(*tensors, dout=dout[:, of_q], sink=mine, sink_layout=sink_layout, **options))
    joined = {}
    for field in fields(AttnResult):
        values = [getattr(part, field.name) for part in parts]
        axis = {"max_logits": 0, "dsink": -1}.get(field.name, 1)
        joined[field.name] = None if values[0] is None else torch.cat(values, dim=axis)
    return AttnResult(**joined)


def run(dtype: torch.dtype, sink: Tensor | None = None, **options: Any) -> AttnResult:
    q, k, v, dout, _ = make_tensors(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if sink is not None:
        leaves.append(sink.clone().requires_grad_())
        options["sink"] = leaves[-1]
    out, meta = flex_flash_attn_func(q, k, v, return_max_logits=True, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    return AttnResult(out.detach(), None if meta.lse is None else meta.lse.detach(), meta.max_logits, *grads)


def check(actual: AttnResult, dense: Tensor, dtype: torch.dtype, sink: Tensor | None = None, **options: Any) -> None:
    oracle, plain = (solve(one, dense, sink, inputs=dtype, **options) for one in (attention_oracle, plain_result))
    assert_results_as_exact(actual, oracle, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_and_gradients(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    lists = random_lists(1, sizes)
    given = {"index_attn_indices": lists, "q_block_size": sizes[0], "k_block_size": sizes[1]}
    check(run(dtype, **given), attended(lists, sizes), dtype)
    check(run(dtype, index_attn=True, softcap=2.0, **given), attended(lists, sizes), dtype, softcap=2.0)


@pytest.mark.parametrize("layout", ["sh", "ssh"])
def test_sinks(layout: str) -> None:
    lists = random_lists(2, (8, 8))
    sink = make_tensors(torch.float32)[4]
    sink = sink if layout == "sh" else sink.expand(NUM_Q, -1, -1).contiguous()
    options: dict[str, Any] = {"sink_layout": layout, "softmax_scale": 0.3}
    given = {"index_attn_indices": lists, "q_block_size": 8, "k_block_size": 8}
    actual = run(torch.float32, sink, softcap=None, **given, **options)
    check(actual, attended(lists, (8, 8)), torch.float32, sink, **options)


def test_a_sink_of_one_axis_is_one_sink() -> None:
    sink, ranges = make_tensors(torch.float32)[4][0], torch.tensor([[0, 50]], dtype=torch.int32)
    flat = run(torch.float32, sink, q_ranges=ranges, k_ranges=ranges, softcap=None)
    two_axes = run(torch.float32, sink[None], q_ranges=ranges, k_ranges=ranges, softcap=0.0)
    assert flat.dsink is not None and flat.dsink.shape == sink.shape
    for field in fields(AttnResult):
        value, expected = getattr(flat, field.name), getattr(two_axes, field.name)
        assert torch.equal(value, expected[0] if field.name == "dsink" else expected), field.name


def test_gradients_through_lse() -> None:
    """Of what each head's call gives: here plain attention, whose lse is differentiable."""
    sizes = (8, 8)
    lists = random_lists(4, sizes)
    lists[:, :, 0] = torch.where(lists[:, :, 0] < 0, 0, lists[:, :, 0])  # no query attends nothing

    def plain(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (x.expand(-1, q.shape[1], -1) if x.shape[1] == 1 else x.repeat_interleave(GROUP, dim=1) for x in (k, v))
        logits = torch.einsum("qhd,khd->qhk", q, k).masked_fill(~dense, -math.inf)
        return (
            torch.einsum("qhk,khd->qhd", logits.softmax(-1), v),
            logits.logsumexp(-1),
            logits.flatten(0, 1).amax(-1)[:1],
        )

    def of_tables(q: Tensor, k: Tensor, v: Tensor, tables: Any, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dense = torch.zeros(NUM_Q, NUM_K, dtype=torch.bool)
        for (q0, q1), (k0, k1) in zip(tables[0].tolist(), tables[1].tolist(), strict=True):
            dense[q0:q1, k0:k1] = True
        return plain(q, k, v, dense[:, None], sink)

    q, k, v, _, _ = (x.requires_grad_() for x in make_tensors(torch.float64))
    _, lse, _ = attend_listed_blocks(of_tables, q, k, v, None, lists, sizes)
    dense = attended(lists, sizes).permute(1, 0, 2).repeat_interleave(GROUP, dim=1)
    expected = plain(q, k, v, dense, None)[1]
    torch.testing.assert_close(lse, expected)
    weights = torch.randn(lse.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for actual, wanted in zip(
        *(torch.autograd.grad((x * weights).sum(), (q, k)) for x in (lse, expected)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_heads_that_list_the_same_are_one_call() -> None:
    lists = random_lists(6, (8, 8), num_heads=1).expand(-1, HEADS_KV, -1)
    assert len(tables_of_indices(lists, (8, 8), NUM_Q, NUM_K, HEADS_KV, lists.device)) == 1
    mask = AttnMask.from_block_indices(lists, 8, 8, NUM_Q, NUM_K)
    given = {"index_attn_indices": lists, "q_block_size": 8, "k_block_size": 8}
    check(run(torch.float32, **given), attended(lists, (8, 8)), torch.float32)
    check(run(torch.float32, mask=mask), attended(lists, (8, 8)), torch.float32)


def test_adjacent_blocks_are_merged_and_their_number_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = torch.tensor([[[3, 1, 2, -1]], [[1, 2, 3, -1]], [[5, 3, -1, -1]]], dtype=torch.int32)
    ((q_ranges, k_ranges, types),) = tables_of_indices(lists, (4, 10), 11, 60, 1, lists.device)
    rows = sorted(zip(q_ranges.tolist(), k_ranges.tolist(), strict=True))
    assert rows == [([0, 8], [10, 40]), ([8, 11], [30, 40]), ([8, 11], [50, 60])]
    assert types is None and q_ranges.dtype == k_ranges.dtype == torch.int32
    monkeypatch.setattr(index_attn, "MOST_ROWS", 2)
    with pytest.raises(ValueError, match="make 3 ranges of keys for a kv head, more than the 2 that are taken"):
        tables_of_indices(lists.clone(), (4, 10), 11, 60, 1, lists.device)


def test_tables_are_kept_until_the_indices_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = random_lists(7, (8, 8))
    arguments: Any = ((8, 8), NUM_Q, NUM_K, HEADS_KV, lists.device)
    first = tables_of_indices(lists, *arguments)
    assert tables_of_indices(lists, *arguments) is first
    lists[0] = -1
    second = tables_of_indices(lists, *arguments)
    assert second is not first
    assert not any((q_ranges[:, 0] < 8).any() for q_ranges, _, _ in second)
    kept = weakref.ref(second[0][0])
    del first, second, lists
    gc.collect()
    assert kept() is None
    with torch.inference_mode():
        lists = random_lists(7, (8, 8))
        assert tables_of_indices(lists, *arguments) is not tables_of_indices(lists, *arguments)


@pytest.mark.parametrize("sanity", ["0", "1"])
def test_a_block_listed_twice_is_found_under_sanity_check(monkeypatch: pytest.MonkeyPatch, sanity: str) -> None:
    lists = random_lists(8, (8, 8))
    given = {"index_attn_indices": lists, "q_block_size": 8, "k_block_size": 8}
    run(torch.float32, **given)  # found also where the tables are kept already
    lists[3, 1, :3] = torch.tensor([4, 2, 4])
    lists[3, 1, 3:] = -1
    run(torch.float32, **given)
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", sanity)
    if sanity == "1":
        with pytest.raises(ValueError, match=r"list a block of keys once, got 4 twice in the list at \[3, 1\]"):
            run(torch.float32, **given)
    else:
        run(torch.float32, **given)


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "nothing"])
def test_a_mask_in_place_of_ranges(kind: str) -> None:
    mask = {
        "causal": AttnMask.causal(NUM_Q, NUM_K),
        "window": AttnMask.sliding_window(NUM_Q, (9, 4), NUM_K, num_global=3),
        "documents": AttnMask.varlen([0, 7, 30, NUM_Q], [0, 40, 41, NUM_K], causal=True),
        "nothing": AttnMask(np.empty((0, 6), int), NUM_Q, NUM_K),
    }[kind]
    dense = torch.from_numpy(mask.to_dense()).expand(HEADS_KV, -1, -1)
    check(run(torch.float32, mask=mask), dense, torch.float32)


def test_tables_of_a_mask_are_made_once_and_go_with_it() -> None:
    mask, device = AttnMask.causal(NUM_Q), torch.device("cpu")
    with torch.inference_mode():
        tables = masks.tables_of_mask(mask, NUM_Q, NUM_Q, device)
    assert not any(table is not None and table.is_inference() for table in tables)
    again = masks.tables_of_mask(mask, NUM_Q, NUM_Q, device)
    assert all(one is other for one, other in zip(tables, again, strict=True))
    other = AttnMask.causal(NUM_Q)  # equal, and another object
    assert masks.tables_of_mask(other, NUM_Q, NUM_Q, device)[0] is not tables[0]
    kept = weakref.ref(tables[0])
    del mask, tables, again
    gc.collect()
    assert kept() is None


def test_compiled() -> None:
    """The lists are no part of the graph: other lists of the same shape are not compiled again."""
    sizes, mask = (8, 8), AttnMask.causal(NUM_Q, NUM_K)

    def attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
        blocks, meta = flex_flash_attn_func(q, k, v, index_attn_indices=lists, q_block_size=8, k_block_size=8)
        assert meta.lse is not None
        return blocks + flex_flash_attn_func(q, k, v, mask=mask)[0], meta.lse

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        lists = random_lists(seed, sizes)
        results = []
        for function in (attend, compiled):
            q, k, v, dout, _ = make_tensors(torch.float32)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out, lse = function(q, k, v, lists)
            results.append((out, lse, *torch.autograd.grad(out, leaves, dout)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
