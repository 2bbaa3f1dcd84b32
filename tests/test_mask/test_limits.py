"""Numbers at the ends of their types: the right mask, or a ValueError that says the limit. Nothing wraps around."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from magi_attention.api import infer_attn_mask_from_cu_seqlens, magi_attn_varlen_key
from magi_attention.cli import masks as cli_masks
from magi_attention.common import AttnRange, AttnRanges, RangeError
from magi_attention.config import DispatchConfig, DistAttnConfig
from magi_attention.mask import AttnMask, varlen

UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]
TENSORS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
TAKE_CU_SEQLENS: dict[str, Callable[[Any], Any]] = {
    "varlen": varlen,
    "keys of varlen": lambda edges: varlen([0] * len(edges), edges),
    "AttnMask.from_cu_seqlens": AttnMask.from_cu_seqlens,
    "varlen_block_causal": lambda edges: AttnMask.varlen_block_causal(edges, 2),
    "varlen_prefix_lm": lambda edges: AttnMask.varlen_prefix_lm(edges, [0] * (len(edges) - 1)),
    "chunked_causal": lambda edges: AttnMask.chunked_causal(int(edges[-1]), 2, edges),
    "multimodal": lambda edges: AttnMask.multimodal(int(edges[-1]), np.empty((0, 2), int), edges),
    "AttnRanges.from_cu_seqlens": lambda edges: AttnRanges.from_cu_seqlens(edges, int(edges[-1])),
    "infer_attn_mask_from_cu_seqlens": lambda edges: infer_attn_mask_from_cu_seqlens(edges, edges),
    "magi_attn_varlen_key": lambda edges: magi_attn_varlen_key(edges, edges, 1, 1, 8),
}
WRONG_CU_SEQLENS = {
    "wraps around to ascending": [0, 2**63 - 1, -2, 98],
    "beyond int64": [0, 2**64],
    "float64 to numpy": [0, 2**63, 2**63 + 5, 3],
    "beyond int32 ranges": torch.tensor([0, 2**40]),
    "beyond int32 ranges, unsigned": np.array([0, 2**64 - 1], np.uint64),
    **{f"descending {kind.__name__}": np.array([0, 30, 20, 51], kind) for kind in UNSIGNED},
    **{f"descending {kind}": torch.tensor([0, 30, 20, 51]).to(kind) for kind in TENSORS},
    "bools": np.array([False, True]),
    "floats": [0.0, 5.0],
}


@pytest.mark.parametrize("take", TAKE_CU_SEQLENS)
@pytest.mark.parametrize("wrong", WRONG_CU_SEQLENS)
def test_cu_seqlens_that_are_none(wrong: str, take: str) -> None:
    if take == "AttnRanges.from_cu_seqlens" and wrong == "beyond int32 ranges":
        pytest.skip("ranges reach further than masks do")
    with pytest.raises(ValueError, match=r"cu_seqlens|num_tokens must be|2\^40|two ints"):
        TAKE_CU_SEQLENS[take](WRONG_CU_SEQLENS[wrong])


@pytest.mark.parametrize("kind", [*UNSIGNED, np.int8, np.int64, *TENSORS])
def test_cu_seqlens_of_every_integer_type(kind: Any) -> None:
    values = [0, 3, 3, 100, 127]
    edges = torch.tensor(values).to(kind) if isinstance(kind, torch.dtype) else np.array(values, kind)
    assert varlen(edges, causal=True) == varlen(values, causal=True)
    assert infer_attn_mask_from_cu_seqlens(edges, edges) == infer_attn_mask_from_cu_seqlens(values, values)
    assert AttnMask.from_document_ids(edges) == AttnMask.from_document_ids(values)
    positions = (
        torch.tensor([0, 1, 2, 0, 1]).to(kind) if isinstance(kind, torch.dtype) else np.array([0, 1, 2, 0, 1], kind)
    )
    assert AttnMask.from_position_ids(positions) == varlen([0, 3, 5], causal=True)
    pairs = np.array([[0, 3], [3, 5]])
    given = torch.tensor(pairs).to(kind) if isinstance(kind, torch.dtype) else pairs.astype(kind)
    assert AttnMask.from_slices(given, given) == AttnMask.from_slices(pairs, pairs)


def test_document_ids_at_the_ends_of_int64() -> None:
    low, high = -(2**63), 2**63 - 1
    expected = AttnMask.from_document_ids([0, 0, 1, 2, 1])
    assert AttnMask.from_document_ids([high, high, low, 0, low]) == expected
    assert AttnMask.from_document_ids([low, low, high, -1, high]) == expected
    with pytest.raises(ValueError, match="document_ids must fit in int64"):
        AttnMask.from_document_ids(np.array([0, 2**63], np.uint64))
    with pytest.raises(ValueError, match="position_ids must fit in int64"):
        AttnMask.from_position_ids([0, 2**64])


def as_json(num_q: object, num_k: object, rows: object) -> str:
    return json.dumps({"format": "magi_attention.mask/1", "num_q": num_q, "num_k": num_k, "rows": rows})


@pytest.mark.parametrize("far", [5, 2**31, 2**62, 2**63 - 1, 2**63, 2**70])
def test_bands_of_json_that_bound_nothing(far: int) -> None:
    for lo, hi, mask in (
        (-far, far, AttnMask.full(5)),
        (-far, 0, AttnMask.causal(5)),
        (0, far, AttnMask.causal(5).transpose()),
        (far, far + 1, AttnMask(np.empty((0, 6), int), 5, 5)),
        (-far - 1, -far, AttnMask(np.empty((0, 6), int), 5, 5)),
    ):
        assert AttnMask.from_json(as_json(5, 5, [[0, 5, 0, 5, lo, hi]])) == mask


@pytest.mark.parametrize(
    "text",
    [
        as_json(-5, -5, []),
        as_json(True, True, []),
        as_json(5, 2**31, []),
        as_json(5, 5.0, []),
        as_json(5, 5, [[False, 5, 0, 5, -4, 4]]),
        as_json(5, 5, [[0, 5, 0, 5, -4, 4.0]]),
        as_json(5, 5, [[0, 5, 0, 5, -4]]),
        as_json(5, 5, [0, 5, 0, 5, -4, 4]),
        as_json(5, 5, {"0": [0, 5, 0, 5, -4, 4]}),
        as_json(5, 5, "000000"),
        as_json(5, 5, [[0, 2**63 - 1, 0, 5, -4, 4]]),
        as_json(5, 5, [[0, 5, 0, 2**63 - 1, -4, 4]]),
        as_json(5, 5, [[-(2**63), 5, 0, 5, -4, 4]]),
        as_json(5, 5, [[1 - 2**63, 5, 0, 2**63 - 1, -4, 4]]),
        as_json(5, 5, [[4, 2, 0, 5, -4, 4]]),
        as_json(5, 5, [[0, 5, 0, 5, -4, "NaN"]]).replace('"NaN"', "NaN"),
        as_json(5, 5, [[0, 5, 0, 5, -4, 4]]).replace("4]", "4" * 5000 + "]"),
        as_json(5, 5, 0).replace('"rows": 0', f'"rows": {"[" * 500 + "]" * 500}'),
        "[" * 100_000 + "]" * 100_000,
        None,
    ],
)
def test_json_that_is_no_mask(text: Any) -> None:
    with pytest.raises(ValueError, match=r"mask as JSON|num_[qk] must be"):
        AttnMask.from_json(text)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: AttnMask(np.empty((0, 6), int), -1, 5), "num_q must be an int of 0 or more"),
        (lambda: AttnMask(np.empty((0, 6), int), 5, True), "num_k must be an int of 0 or more"),
        (lambda: AttnMask(np.empty((0, 6), int), 5, 2.0), "num_k must be an int of 0 or more"),
        (lambda: AttnMask(np.array([[0, 5, 0, 5, -(2**63), 4]]), 5, 5), "none beyond 2,147,483,647"),
        (lambda: AttnMask(np.array([[0, 5, 0, 5, -4, 2**63 - 1]]), 5, 5), "none beyond 2,147,483,647"),
        (lambda: AttnMask(np.array([[0, 5, 0, 5, 0, 2**64 - 1]], np.uint64), 5, 5), "none beyond 2,147,483,647"),
        (lambda: AttnMask(np.array([[0, 5, 0, 5, -4.0, 4]]), 5, 5), "six ints"),
        (lambda: AttnMask(np.zeros((2, 3), int), 5, 5), "shape \\[2, 3\\]"),
        (lambda: AttnMask.causal(2**40), "num_q must be at most 2,147,483,647"),
        (lambda: AttnMask.full(5, 2**64), "num_k must be at most 2,147,483,647"),
        (lambda: AttnMask.from_slices([(0, 2**63 - 1)], [(0, 4)]), "q_ranges must stay within 2,147,483,647"),
        (lambda: AttnMask.from_slices([(0, 4)], [(-(2**63), 2**63 - 1)]), "k_ranges must stay within 2,147,483,647"),
        (lambda: AttnMask.shared_prefix([2**62, 2**62, 2**62], [-1, 0, 0]), "lengths must stay within"),
        (lambda: AttnMask.shared_prefix([2**31 - 1] * 3, [-1, 0, 0]), "at most 2,147,483,647"),
        (lambda: AttnMask.concat(AttnMask.full(2**31 - 1), AttnMask.full(1)), "at most 2,147,483,647"),
        (lambda: AttnMask.full(4).shift(2**63, 0), "q_by must be an int of at most 2,147,483,647"),
        (lambda: AttnMask.full(4).shift(0, 2**31 - 1), "num_k must be at most 2,147,483,647"),
        (lambda: AttnMask.full(4).restrict((0.5, 2.5)), "q_ranges must be ints"),
    ],
)
def test_limits_are_told(build: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build()


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63, 2**70])
def test_sizes_beyond_every_length_bound_nothing(huge: int) -> None:
    edges = [0, 3, 8]
    assert varlen(edges, window_size=(huge, 0)) == varlen(edges, causal=True)
    assert varlen(edges, window_size=(huge, huge)) == varlen(edges)
    assert varlen(edges, window_size=(1, 0), num_global=huge).attends_same(varlen(edges, causal=True))
    assert AttnMask.sliding_window(8, (huge, 0)) == AttnMask.causal(8)
    assert AttnMask.varlen_block_causal(edges, huge) == varlen(edges)
    assert AttnMask.varlen_block_causal(edges, 2, num_blocks=huge) == AttnMask.varlen_block_causal(edges, 2)
    assert AttnMask.varlen_block_causal(edges, huge, num_blocks=huge) == varlen(edges)
    assert AttnMask.chunked_causal(8, huge) == AttnMask.causal(8)
    assert AttnMask.dilated_blocks(8, huge, 2) == AttnMask.causal(8)
    assert AttnMask.dilated_blocks(8, 2, huge).attends_same(AttnMask.chunked_causal(8, 2))
    assert AttnMask.dilated_blocks(8, 2, 2, num_blocks=huge) == AttnMask.dilated_blocks(8, 2, 2)
    assert AttnMask.strided_blocks(8, 2, huge) == AttnMask.chunked_causal(8, 2)
    assert AttnMask.strided_blocks(8, huge, 1) == AttnMask.causal(8)
    assert AttnMask.full(8).restrict((0, huge), (-huge, 4)) == AttnMask.full(8).restrict(None, (0, 4))
    _, _, types, total, _ = infer_attn_mask_from_cu_seqlens(
        edges, edges, window_size=(huge, 0), global_window_size=huge
    )
    assert ([kind.value for kind in types], total) == (["causal", "causal"], 8)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64, np.int64])
def test_bounds_of_columns_at_the_ends_of_their_type(kind: Any) -> None:
    last = np.iinfo(kind).max
    assert AttnMask.from_startend_row_indices(np.full((200, 1), min(last, 2**63), kind), causal=True) == (
        AttnMask.causal(200) if last > 200 else AttnMask.causal(200).restrict((0, last))
    )


def test_cells_listed_many_times_are_counted_exactly() -> None:
    longest = (1 << 31) - 1
    full = AttnMask.full(longest)
    assert AttnMask(np.repeat(full.bands, 5, axis=0), longest, longest).area == 5 * longest**2


@pytest.mark.parametrize("bound", [2**40 + 1, 2**63, -(2**40) - 1, 2**70, True, 2.0])
def test_bounds_of_ranges(bound: Any) -> None:
    for make in (
        lambda: AttnRange(bound, bound),
        lambda: AttnRange.from_range((bound, bound)),
        lambda: AttnRanges.from_ranges([(0, 3), (bound, bound)]),
        lambda: setattr(AttnRange(0, 1), "start", bound),
        lambda: setattr(AttnRange(0, 1), "end", bound),
        lambda: AttnRange(0, 1).offset(bound) if bound is not True else AttnRange(True, 5),
    ):
        with pytest.raises(RangeError, match=r"2\^40|two ints"):
            make()


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63, 2**70])
def test_chunks_and_padding_of_keys(huge: int) -> None:
    for options in ({"chunk_size": huge}, {"pad_size": huge}, {"chunk_size": 1, "pad_size": huge}):
        with pytest.raises(ValueError, match=r"its padding must be at most 2,147,483,647 tokens|pad_size must be 0"):
            magi_attn_varlen_key([0, 8], [0, 8], 1, 1, 8, **options)  # type: ignore[arg-type]
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=huge, uneven_shard=True))
    with pytest.raises(ValueError, match="in chunks of"):
        magi_attn_varlen_key([0, 8], [0, 8], 1, 1, 8, dist_attn_config=config)


def test_sizes_of_the_longest_ranges() -> None:
    longest = AttnRange(-(2**40), 2**40)
    ranges = AttnRanges.from_ranges([longest] * 8)
    assert ranges.total_seqlen == 8 * 2**41
    assert ranges.intersect_size() == 7 * 2**41
    assert ranges.intersect_size_with(ranges) == 15 * 2**41
    assert AttnRange(0, 5).truncate(2**62).is_empty()
    assert AttnRange(0, 5).truncate(-(2**62), 2**62) == AttnRange(0, 5)
    assert ranges.find_overlap_ranges(ranges).to_naive_ranges() == [(-(2**40), 2**40)]


def test_lengths_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text(f"5 {2**64}")
    parser = argparse.ArgumentParser()
    cli_masks.add_arguments(parser)
    for options in (["--lengths", str(file)], ["--tokens", str(2**40)]):
        with pytest.raises(ValueError, match=r"must fit in int64|--tokens must be at most 2,147,483,647"):
            cli_masks.mask_of(parser.parse_args(["--mask", "varlen-causal", *options]))
