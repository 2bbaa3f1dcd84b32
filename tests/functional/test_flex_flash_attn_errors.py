"""What flex_flash_attn_func says of bad input: what was expected, what came, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from magi_attention.functional import flex_flash_attn_func
from magi_attention.mask import AttnMask


def int32(rows: list[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def good() -> dict[str, Any]:
    return {
        "q": torch.randn(8, 4, 16),
        "k": torch.randn(10, 2, 16),
        "v": torch.randn(10, 2, 24),
        "q_ranges": int32([[0, 4], [4, 8]]),
        "k_ranges": int32([[0, 10], [2, 8]]),
        "attn_type_map": int32([0, 1]),
    }


def call(arguments: dict[str, Any]) -> Tensor:
    return flex_flash_attn_func(**arguments)[0]


def give(arguments: dict[str, Any], **others: Any) -> None:
    """In place of ranges."""
    arguments.update(q_ranges=None, k_ranges=None, attn_type_map=None, **others)


CASES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "q with a batch axis": (
        lambda a: a.update(q=torch.randn(1, 8, 4, 16)),
        r"q must be \[num_tokens_q, num_heads_q, head_dim\]",
    ),
    "k with two axes": (lambda a: a.update(k=torch.randn(10, 32)), r"k must be .*no batch axis; got shape \[10, 32\]"),
    "v that is no tensor": (lambda a: a.update(v=[[1.0]]), "v must be .*got a list"),
    "no heads": (
        lambda a: a.update(k=torch.randn(10, 0, 16), v=torch.randn(10, 0, 24)),
        "k must have at least one head",
    ),
    "k longer than v": (
        lambda a: a.update(k=torch.randn(11, 2, 16)),
        r"k and v must agree.*\[11, 2, 16\] and v \[10, 2, 24\]",
    ),
    "k with other heads than v": (
        lambda a: a.update(k=torch.randn(10, 4, 16)),
        "k and v must agree in tokens and heads",
    ),
    "another head_dim": (
        lambda a: a.update(k=torch.randn(10, 2, 32)),
        "q and k must have one head_dim .* got 16 and 32",
    ),
    "heads that do not group": (
        lambda a: a.update(q=torch.randn(8, 3, 16)),
        "num_heads_q must be a multiple of .* got 3 and 2",
    ),
    "mixed dtypes": (lambda a: a.update(k=a["k"].bfloat16()), "one dtype out of .*torch.float32, torch.bfloat16"),
    "integers": (lambda a: a.update(q=a["q"].int(), k=a["k"].int(), v=a["v"].int()), "one dtype out of .*torch.int32"),
    "mixed devices": (lambda a: a.update(k=a["k"].to("meta")), "one device, got cpu, meta"),
    "ranges that are lists": (lambda a: a.update(q_ranges=[[0, 4]]), "q_ranges must be an int32 tensor .*got a list"),
    "ranges of int64": (
        lambda a: a.update(k_ranges=a["k_ranges"].long()),
        "k_ranges must be an int32 tensor.*torch.int64",
    ),
    "ranges elsewhere": (
        lambda a: a.update(k_ranges=a["k_ranges"].to("meta")),
        "k_ranges must be on q's device cpu, got meta",
    ),
    "ranges of three": (
        lambda a: a.update(q_ranges=int32([[0, 1, 2]] * 2)),
        r"q_ranges must be \[n, 2\].*got shape \[2, 3\]",
    ),
    "flat ranges": (lambda a: a.update(k_ranges=int32([0, 1])), r"k_ranges must be \[n, 2\].*got shape \[2\]"),
    "fewer k ranges": (
        lambda a: a.update(k_ranges=int32([[0, 10]])),
        r"one length; got q_ranges \[2, 2\], k_ranges \[1, 2\]",
    ),
    "more types": (lambda a: a.update(attn_type_map=int32([0, 1, 2])), r"one length; .*attn_type_map \[3\]"),
    "types of two axes": (lambda a: a.update(attn_type_map=int32([[0, 1]])), r"one length; .*attn_type_map \[1, 2\]"),
    "float types": (lambda a: a.update(attn_type_map=torch.zeros(2)), "attn_type_map must be an int32 tensor.*float32"),
    "types elsewhere": (
        lambda a: a.update(attn_type_map=a["attn_type_map"].to("meta")),
        "attn_type_map must be on q's device",
    ),
    "an unknown type": (lambda a: a.update(attn_type_map=int32([0, 4])), r"3 \(bi_causal\), got 4 at 1"),
    "a negative type": (lambda a: a.update(attn_type_map=int32([-1, 0])), "got -1 at 0"),
    "queries beyond the end": (
        lambda a: a.update(q_ranges=int32([[0, 4], [4, 9]])),
        r"q_ranges\[1\] .*<= 8 .*got \[4, 9\)",
    ),
    "keys beyond the end": (
        lambda a: a.update(k_ranges=int32([[0, 11], [2, 8]])),
        r"k_ranges\[0\] .*<= 10 .*got \[0, 11\)",
    ),
    "a negative start": (lambda a: a.update(q_ranges=int32([[-1, 4], [4, 8]])), r"q_ranges\[0\] .*got \[-1, 4\)"),
    "a reversed range": (lambda a: a.update(k_ranges=int32([[0, 10], [8, 2]])), r"k_ranges\[1\] .*got \[8, 2\)"),
    "a negative softcap": (lambda a: a.update(softcap=-1.0), "softcap must be 0 .*got -1.0"),
    "a sink layout": (lambda a: a.update(sink_layout="shd"), "sink_layout must be 'sh' or 'ssh', got 'shd'"),
    "a flat sink of other heads": (
        lambda a: a.update(sink=torch.zeros(2)),
        r"sink must be \[num_sink, 4\] under sink_layout='sh'.*\[1, 2\]",
    ),
    "a flat sink under ssh": (
        lambda a: a.update(sink=torch.zeros(4), sink_layout="ssh"),
        r"sink must be \[8, num_sink, 4\] under sink_layout='ssh', got shape \[4\]",
    ),
    "no ranges": (lambda a: a.update(q_ranges=None, k_ranges=None), "given in one way: .*got attn_type_map"),
    "nothing attended": (
        lambda a: a.update(q_ranges=None, k_ranges=None, attn_type_map=None),
        "given in one way: .*got none of them",
    ),
    "q ranges alone": (lambda a: a.update(k_ranges=None), "given in one way: .*got q_ranges and attn_type_map"),
    "ranges and a mask": (
        lambda a: a.update(mask=AttnMask.full(8, 10)),
        "given in one way: .*got q_ranges and k_ranges and attn_type_map and mask",
    ),
    "ranges and indices": (
        lambda a: a.update(attn_type_map=None, index_attn_indices=int32([[[0], [0]]] * 8)),
        "given in one way: .*got q_ranges and k_ranges and index_attn_indices",
    ),
    "a mask of other lengths": (
        lambda a: give(a, mask=AttnMask.full(8)),
        "queries and keys .* 8 and 10, got one of 8 and 8",
    ),
    "a mask that is none": (lambda a: give(a, mask="causal"), "mask must be an AttnMask, got a str"),
    "a mask and indices": (
        lambda a: give(a, mask=AttnMask.full(8, 10), index_attn_indices=int32([[[0], [0]]] * 8)),
        "given in one way: .*got mask and index_attn_indices",
    ),
    "indices of int64": (
        lambda a: give(a, index_attn_indices=int32([[[0], [0]]] * 8).long()),
        r"int32 \[8, 2, topk\].*got shape \[8, 2, 1\] of torch.int64",
    ),
    "indices of other blocks": (
        lambda a: give(a, index_attn_indices=int32([[[0], [0]]] * 8), q_block_size=4),
        r"int32 \[2, 2, topk\].*got shape \[8, 2, 1\]",
    ),
    "indices of query heads": (
        lambda a: give(a, index_attn_indices=int32([[[0]] * 4] * 8)),
        r"int32 \[8, 2, topk\].*got shape \[8, 4, 1\]",
    ),
    "indices elsewhere": (
        lambda a: give(a, index_attn_indices=int32([[[0], [0]]] * 8).to("meta")),
        "index_attn_indices must be on q's device cpu, got meta",
    ),
    "indices that are a list": (lambda a: give(a, index_attn_indices=[[[0]]]), "got a list"),
    "a block beyond the end": (
        lambda a: give(a, index_attn_indices=int32([[[0], [3]]] * 8), k_block_size=4),
        r"blocks in \[0, 3\), or -1 as padding at the end of a list, got 3 at \[0, 1, 0\]",
    ),
    "a block before the first": (
        lambda a: give(a, index_attn_indices=int32([[[0], [-2]]] * 8)),
        r"got -2 at \[0, 1, 0\]",
    ),
    "padding before a block": (
        lambda a: give(a, index_attn_indices=int32([[[0, -1], [-1, 3]]] * 8)),
        r"at the end of a list, got a block behind padding at \[0, 1, 0\]",
    ),
    "blocks of no queries": (
        lambda a: give(a, index_attn_indices=int32([[[0], [0]]] * 8), q_block_size=0),
        "q_block_size must be an int of 1 or more, got 0",
    ),
    "blocks of no keys": (
        lambda a: give(a, index_attn_indices=int32([[[0], [0]]] * 8), k_block_size=True),
        "k_block_size must be an int of 1 or more, got True",
    ),
    "a sink of other heads": (lambda a: a.update(sink=torch.zeros(1, 2)), r"sink must be \[num_sink, 4\].*\[1, 2\]"),
    "a sink of other tokens": (
        lambda a: a.update(sink=torch.zeros(10, 1, 4), sink_layout="ssh"),
        r"sink must be \[8, num_sink, 4\] under sink_layout='ssh', got shape \[10, 1, 4\]",
    ),
    "a sink of one layout as the other": (
        lambda a: a.update(sink=torch.zeros(8, 1, 4)),
        r"sink must be \[num_sink, 4\]",
    ),
    "a sink of integers": (
        lambda a: a.update(sink=torch.zeros(1, 4, dtype=torch.int32)),
        "sink must be a floating-point",
    ),
    "a sink elsewhere": (
        lambda a: a.update(sink=torch.zeros(1, 4, device="meta")),
        "sink must be on q's device cpu, got meta",
    ),
}


def test_the_good_call_is_good() -> None:
    assert call(good()).shape == (8, 4, 24)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    spoil, message = CASES[name]
    arguments = good()
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        call(arguments)


@pytest.mark.parametrize("sanity", ["0", "1"])
def test_cells_listed_twice_are_found_under_sanity_check(monkeypatch: pytest.MonkeyPatch, sanity: str) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_SANITY_CHECK", sanity)
    arguments = good()
    assert call(arguments).isfinite().all()
    # Rectangles that overlap without a common cell are no error.
    arguments.update(q_ranges=int32([[0, 8]] * 2), k_ranges=int32([[0, 8], [1, 8]]), attn_type_map=int32([1, 2]))
    assert call(arguments).isfinite().all()
    arguments.update(k_ranges=int32([[0, 8], [0, 8]]))
    if sanity == "1":
        with pytest.raises(ValueError, match="disjoint cells"):
            call(arguments)
    else:
        call(arguments)


def test_a_backend_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = good()
    outs = []
    for name in ("auto", "reference", "tiled", "cpu"):
        monkeypatch.setenv("MAGI_ATTENTION_BACKEND", name)
        outs.append(call(arguments))
    monkeypatch.delenv("MAGI_ATTENTION_BACKEND")
    monkeypatch.setenv("MAGI_ATTENTION_SDPA_BACKEND", "1")
    outs.append(call(arguments))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    assert torch.equal(outs[1], outs[-1]), "SDPA_BACKEND is the reference"
    monkeypatch.delenv("MAGI_ATTENTION_SDPA_BACKEND")
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "fast")
    with pytest.raises(ValueError, match="no attention backend 'fast'; the backends are auto, reference"):
        call(arguments)
