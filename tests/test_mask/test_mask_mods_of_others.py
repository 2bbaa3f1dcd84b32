"""Mask functions as other projects write them, and the tensor methods that they call: proved, not evaluated cell by cell."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from magi_attention.mask import AttnMask, flex, mask_mod
from magi_attention.mask.index_ranges import NotReadableError
from magi_attention.mask.tile_bounds import tile_bounds

MaskMod = Callable[[Any, Any, Any, Any], Any]

NUM_TOKENS = 300
LENGTHS = [70, 1, 109, 100, 20]
DOCUMENTS = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
STARTS = torch.repeat_interleave(torch.tensor([0, 70, 71, 180, 280]), torch.tensor(LENGTHS))
POSITIONS = torch.arange(NUM_TOKENS) - STARTS
IMAGES = torch.full((NUM_TOKENS,), -1)
IMAGES[20:50], IMAGES[200:240] = 0, 1
REAL = torch.ones(NUM_TOKENS, dtype=torch.bool)
REAL[-30:] = False


def every(*mods: MaskMod) -> MaskMod:
    """As Transformers joins masks: a 0-dim tensor of the index's kind, results moved to its device."""

    def joined(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = q.new_ones((), dtype=torch.bool)
        for mod in mods:
            attended = attended & mod(b, h, q, k).to(attended.device)
        return attended

    return joined


def some(*mods: MaskMod) -> MaskMod:
    def joined(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = q.new_zeros((), dtype=torch.bool)
        for mod in mods:
            attended = attended | mod(b, h, q, k).to(attended.device)
        return attended

    return joined


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def packed(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOCUMENTS[None][b, q] == DOCUMENTS[None][b, k]


def real(b: Any, h: Any, q: Any, k: Any) -> Any:
    return REAL[None][b, k]


def image(b: Any, h: Any, q: Any, k: Any) -> Any:
    of_q, of_k = IMAGES[None][b, q], IMAGES[None][b, k]
    return (of_q == of_k) & (of_q >= 0)


def chunked(b: Any, h: Any, q: Any, k: Any) -> Any:
    padding = torch.tensor([7])
    return (k - padding[b]) // 64 == (q - padding[b]) // 64


def image_of_a_longer_cache(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Positions beyond the table are looked up at 0, and told apart after."""
    known = IMAGES[None, :250]
    of_q, of_k = (
        torch.where(at < known.shape[1], known[b, torch.where(at < known.shape[1], at, 0)], -1) for at in (q, k)
    )
    return (of_q == of_k) & (of_q >= 0)


OF_OTHERS: dict[str, MaskMod] = {
    # Transformers
    "causal": every(causal),
    "bidirectional": lambda b, h, q, k: q >= 0,
    "sliding window": every(lambda b, h, q, k: k > q - 50, causal),
    "sliding window, both sides": every(lambda b, h, q, k: abs(q - k) <= 50, lambda b, h, q, k: q >= 0),
    "chunked": every(chunked, causal),
    "packed": every(causal, packed),
    "padded": every(every(causal, packed), real),
    "images": some(causal, image),
    "images, packed": every(some(causal, image), packed, real),
    "a longer cache": some(causal, image_of_a_longer_cache),
    "positions of packed": lambda b, h, q, k: (POSITIONS[None][b, k] <= POSITIONS[None][b, q]) & packed(b, h, q, k),
    "offsets": lambda b, h, q, k: every(causal, lambda b, h, q, k: k > q - 50)(b, h, q + 30, k + 10),
    # torchtitan
    "documents": lambda b, h, q, k: DOCUMENTS.int()[None][b, q] == DOCUMENTS.int()[None][b, k],
    "fixed blocks": lambda b, h, q, k: q // 64 == k // 64,
    "inside fixed blocks": lambda b, h, q, k: (q // 64 == k // 64) & (q % 64 >= k % 64),
    "window": lambda b, h, q, k: (k <= q) & (q - k < 50),
    "document starts": lambda b, h, q, k: (k >= STARTS[q]) & (q >= k),
}
METHODS: dict[str, MaskMod] = {
    "new_tensor": lambda b, h, q, k: q - k <= q.new_tensor(30),
    "new_full": lambda b, h, q, k: q - k <= q.new_full((), 30),
    "new_zeros of ints": lambda b, h, q, k: q - k >= q.new_zeros(()),
    "ones_like": lambda b, h, q, k: torch.ones_like(q, dtype=torch.bool) & (q >= k),
    "zeros_like": lambda b, h, q, k: (q - k >= torch.zeros_like(k)) | torch.zeros_like(q).bool(),
    "full_like": lambda b, h, q, k: torch.full_like(q, 30) >= q - k,
    "torch.tensor": lambda b, h, q, k: q >= k + torch.tensor(3, device=q.device),
    "to dtype": lambda b, h, q, k: q.to(torch.int32) >= k.to(dtype=torch.int32),
    "to another": lambda b, h, q, k: q.to(k) >= k.to(DOCUMENTS),
    "to device and dtype": lambda b, h, q, k: (q >= k).to("cpu", torch.int64).to(torch.bool),
    "type": lambda b, h, q, k: q.type(torch.int64) >= k.type_as(q),
    "int, long and bool": lambda b, h, q, k: (q.int() // 50 - k.long() // 50).bool(),
    "flag as number": lambda b, h, q, k: (q >= k).int() + (q - k < 50).long() == 2,
    "flag times number": lambda b, h, q, k: (q - k) * (q >= k) >= 20,
    "logical": lambda b, h, q, k: (q >= k).logical_and((q - k < 50).logical_not()).logical_or(k == 3),
    "logical_xor": lambda b, h, q, k: torch.logical_xor(q >= k, k < 77),
    "logic of numbers": lambda b, h, q, k: torch.logical_and(q // 100, k % 50) | torch.logical_not(k),
    "comparisons by name": lambda b, h, q, k: torch.ge(q, k) & q.sub(k).lt(50) & torch.ne(k, 5) & k.not_equal(7),
    "where, a method": lambda b, h, q, k: q.where(q > 100, k) >= k + 3,
    "where of numbers": lambda b, h, q, k: torch.where(packed(0, 0, q, k), 1, 0) == 1,
    "abs": lambda b, h, q, k: (q - k).abs() <= torch.abs(q - 150),
    "div": lambda b, h, q, k: torch.div(q, 64, rounding_mode="floor") == k.div(64, rounding_mode="trunc"),
    "div of negative": lambda b, h, q, k: torch.div(k - q, 64, rounding_mode="trunc") == 0,
    "floor_divide by negative": lambda b, h, q, k: torch.floor_divide(q, -64) == k // -64,
    "remainder": lambda b, h, q, k: torch.remainder(q, 64) >= k.remainder(64),
    "clamp": lambda b, h, q, k: q.clamp(min=40) >= torch.clamp(k, 3, max=200),
    "clip": lambda b, h, q, k: q.clamp_min(40) >= k.clip(max=200).clamp_max(150),
    "min and max": lambda b, h, q, k: torch.max(q, k) - torch.minimum(q, k) <= torch.tensor(40).maximum(k // 4),
    "shifts": lambda b, h, q, k: (q >> 6 == k >> 6) | (k << 1 < q),
    "low bits": lambda b, h, q, k: ((q & 63) >= (k & 63)) & ((q & ~63) == (k & ~63)),
    "powers": lambda b, h, q, k: ((q - k) ** 2 <= 900) & (torch.square(k - q) >= 4) & (k.pow(1) > 2),
    "sign": lambda b, h, q, k: torch.sign(q - k) >= 0,
    "isin": lambda b, h, q, k: torch.isin(k, torch.tensor([3, 4, 5, 200])) | torch.isin(q, torch.arange(100, 150)),
    "not isin": lambda b, h, q, k: torch.isin(k, torch.arange(100, 150), invert=True),
    "float bounds": lambda b, h, q, k: (q - k <= 255 / 2) & (k - q < float("inf")) & (k > -0.5) & (q - k != 17.0),
    "in place": lambda b, h, q, k: joined_in_place(q, k),
    "clones": lambda b, h, q, k: cloned(q, k),
    "narrow tables": lambda b, h, q, k: DOCUMENTS.to(torch.uint8)[q] == DOCUMENTS.to(torch.uint8)[k],
    "narrow tables as ints": lambda b, h, q, k: DOCUMENTS.to(torch.int8)[q].long() - DOCUMENTS.short()[k].int() == 1,
    "boolean table": lambda b, h, q, k: REAL[q] & (REAL[k] == REAL[q]),
    "table of blocks": lambda b, h, q, k: (torch.arange(25).reshape(5, 5) % 3 == 1)[q // 64, k // 64],
    "table of blocks, transposed": lambda b, h, q, k: (torch.arange(30).reshape(6, 5) % 3 == 1)[k // 50, q // 64],
    "table of blocks of heads": lambda b, h, q, k: (torch.arange(50).reshape(2, 5, 5) % 3 == 1)[1, q // 64, k // 64],
    "batch, then query": lambda b, h, q, k: DOCUMENTS.expand(3, 2, -1)[0, 1, q] == DOCUMENTS.expand(3, 2, -1)[2][1][k],
    "axis behind": lambda b, h, q, k: DOCUMENTS[:, None].expand(-1, 2)[q, 1] == DOCUMENTS[k],
    "take": lambda b, h, q, k: torch.take(DOCUMENTS, q) == DOCUMENTS.take(k),
    "table of a table": lambda b, h, q, k: torch.tensor([3, 1, 1, 0, 2])[DOCUMENTS[q]] >= DOCUMENTS[k],
    "distances": lambda b, h, q, k: (torch.arange(2 * NUM_TOKENS) % 50 < 20)[q - k + NUM_TOKENS],
    "from the end": lambda b, h, q, k: DOCUMENTS[k - 5] == DOCUMENTS[q],
}


def joined_in_place(q: Any, k: Any) -> Any:
    attended = q >= k
    other_name = attended
    attended &= q - k < 80
    attended |= k - q == 0
    distance = q - k
    distance //= 7
    return other_name & (distance >= 2)


def cloned(q: Any, k: Any) -> Any:
    moved = q.clone()
    moved += 30
    return (moved >= k) & (q.detach().contiguous() <= k)


@pytest.mark.parametrize("name", [*OF_OTHERS, *METHODS])
def test_is_proved_and_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = {**OF_OTHERS, **METHODS}[name]
    zero, index = torch.tensor(0), torch.arange(NUM_TOKENS)
    expected = mod(zero, zero, index[:, None].clone(), index[None].clone()).expand(NUM_TOKENS, NUM_TOKENS)
    monkeypatch.setattr(flex, "_TILE", 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = AttnMask.from_mask_mod(mod, NUM_TOKENS, num_batches=1, num_heads=1)
    np.testing.assert_array_equal(mask.to_dense(), expected.numpy())
    edges = torch.arange(0, NUM_TOKENS, 16)
    tiles = torch.stack([edges, (edges + 16).clamp(max=NUM_TOKENS)], dim=1)
    always, ever = tile_bounds(mod, zero, zero, tiles, tiles)
    for row, (q0, q1) in enumerate(tiles.tolist()):
        for column, (k0, k1) in enumerate(tiles.tolist()):
            cells = expected[q0:q1, k0:k1]
            assert cells.all() or not always[row, column]
            assert not cells.any() or ever[row, column]
    assert (always == ever).any()  # it does prove something


@pytest.mark.parametrize("name", ["sliding window", "packed", "images, packed"])
def test_sixteen_thousand_tokens_take_no_minute(name: str) -> None:
    """Cell by cell these are 268 million cells."""
    times = 16384 // 64
    documents = DOCUMENTS.repeat_interleave(64)[:16384][None]
    mods: dict[str, MaskMod] = {
        "sliding window": every(lambda b, h, q, k: k > q - 4096, causal),
        "packed": every(causal, lambda b, h, q, k: documents[b, q] == documents[b, k]),
        "images, packed": every(
            some(causal, lambda b, h, q, k: q // times == k // times),
            lambda b, h, q, k: documents[b, q] == documents[b, k],
        ),
    }
    begin = time.process_time()
    mask = AttnMask.from_mask_mod(mods[name], 16384, num_batches=1, num_heads=1)
    assert time.process_time() - begin < 10
    assert len(mask.bands) < 200


REFUSED: dict[str, tuple[MaskMod, str]] = {
    "float": (lambda b, h, q, k: q.float() >= k, "it converts an index to torch.float32"),
    "division": (lambda b, h, q, k: q / 2 >= k, "it divides into floats"),
    "any": (lambda b, h, q, k: (k == torch.tensor([3, 200])).any() | (q >= k), "a tensor of shape \\[2\\]"),
    "method": (lambda b, h, q, k: (q >= k).unsqueeze(0).squeeze(0), "it uses Tensor.unsqueeze"),
    "function": (lambda b, h, q, k: torch.sin(q - k) > 0, "it uses sin"),
    "narrow": (
        lambda b, h, q, k: DOCUMENTS.to(torch.int8)[q] + DOCUMENTS.to(torch.int8)[k] > 3,
        "torch.int8, which wraps",
    ),
    "power": (lambda b, h, q, k: (q + 1) ** 9 > k, "a power that may leave int32"),
    "two of queries": (lambda b, h, q, k: torch.eye(300).bool()[q, q] & (q >= k), "not one of queries and one of keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stops_the_proof_is_told_once_at_the_callers_line(name: str) -> None:
    mod, reason = REFUSED[name]
    for convert in (AttnMask.from_mask_mod, flex.from_mask_mod):
        with pytest.warns(UserWarning, match="90,000 cells .* cannot be proved: .*" + reason) as told:
            mask = convert(mod, 300)
        assert len(told) == 1
        assert told[0].filename == __file__
    np.testing.assert_array_equal(mask.to_dense(), create_mask(mod, 1, 1, 300, 300, device="cpu")[0, 0].numpy())


def test_one_warning_for_all_batches_and_heads() -> None:
    with pytest.warns(UserWarning, match="each of the 9,600 cells") as told:
        AttnMask.from_mask_mod(lambda b, h, q, k: q.float() >= k + 0 * (b + h), 40, num_batches=2, num_heads=3)
    assert len(told) == 1


def test_too_many_cells_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_float(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q.float() >= k

    message = "1,152,921,504,606,846,976 cells .* more than the 1,073,741,824 .* it converts an index to torch.float32.*from_document_ids"
    with pytest.raises(ValueError, match=message):
        AttnMask.from_mask_mod(by_float, 1 << 30)
    with pytest.raises(ValueError, match=r"up to 1,073,741,824 tiles of 128 x 128 cells.*varlen"):
        AttnMask.from_mask_mod(causal, 1 << 30)
    monkeypatch.setattr(mask_mod, "MOST_CELLS", 300 * 300 - 1)
    with pytest.raises(ValueError, match="90,000 cells"):
        AttnMask.from_mask_mod(by_float, 300)
    with pytest.warns(UserWarning, match="cannot be proved"):
        AttnMask.from_mask_mod(by_float, 299)
    monkeypatch.setattr(mask_mod, "MOST_CELLS", 4 * 128 * 128 - 1)
    with pytest.raises(ValueError, match=r"65,536 cells .* it converts"):
        AttnMask.from_block_mask(create_block_mask(by_float, 1, 1, 512, 512, device="cpu", BLOCK_SIZE=128))
    monkeypatch.setattr(mask_mod, "MOST_CELLS_AT_ONCE", 8 * 128 * 128)
    with pytest.raises(ValueError, match=r"147,456 cells .* neither attended whole nor not at all"):
        AttnMask.from_mask_mod(lambda b, h, q, k: (q + k) % 2 == 0, 300)
    assert AttnMask.from_mask_mod(causal, 300) == AttnMask.causal(300)


def test_writing_into_tensors_is_not_followed() -> None:
    tiles, zero = torch.tensor([[0, 8], [8, 16]]), torch.tensor(0)

    def into_a_tensor(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = torch.ones((), dtype=torch.bool)
        attended.logical_and_(q >= k)
        return attended

    def into_a_range(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = q >= k
        attended.logical_and_(q >= 3)
        return attended

    def into_a_table(b: Any, h: Any, q: Any, k: Any) -> Any:
        table = torch.zeros(16, dtype=torch.bool)
        table[q] = True
        return table[k]

    def through_out(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = torch.ones((), dtype=torch.bool)
        torch.ge(q, k, out=attended)
        return attended

    def in_place_of_a_tensor(b: Any, h: Any, q: Any, k: Any) -> Any:
        attended = every = torch.ones((), dtype=torch.bool)
        attended &= q >= k
        return every

    for mod in (into_a_tensor, into_a_range, into_a_table, through_out, in_place_of_a_tensor):
        with pytest.raises(NotReadableError):
            tile_bounds(mod, zero, zero, tiles, tiles)


@pytest.mark.parametrize(
    "mod",
    [
        lambda b, h, q, k: (
            (q >= k) & torch.ones_like(b, dtype=torch.bool) & h.new_ones((), dtype=torch.bool).to(h.device)
        ),
        lambda b, h, q, k: (q >= k) | torch.zeros(b.shape, dtype=torch.bool),
    ],
)
def test_a_tensor_like_b_or_h_is_no_reading_of_it(mod: MaskMod) -> None:
    assert AttnMask.from_mask_mod(mod, 12) == AttnMask.causal(12)


def test_a_look_up_outside_a_table_is_told_wherever_it_is() -> None:
    """Also where every entry says the same, so that the tile seems decided."""
    table = torch.ones(200, dtype=torch.bool)
    for mod in (lambda b, h, q, k: table[q], lambda b, h, q, k: table[k - 250], lambda b, h, q, k: table[q] | (k >= 0)):
        with pytest.raises(ValueError, match="IndexError"):
            AttnMask.from_mask_mod(mod, 210)
    assert AttnMask.from_mask_mod(lambda b, h, q, k: table[k - 200], 200) == AttnMask.full(200)
