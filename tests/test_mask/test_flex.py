"""Functions of flex_attention and what is proved of them, against every cell that flex_attention itself would ask about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from mask_cases import CASES, any_mask
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    or_masks,
)

from magi_attention.mask import AttnMask, flex
from magi_attention.mask.index_ranges import NotReadableError
from magi_attention.mask.tile_bounds import tile_bounds

Rng = np.random.Generator
MaskMod = Callable[[Any, Any, Any, Any], Any]

COMPARE = [
    ("<", lambda x, y: x < y),
    ("<=", lambda x, y: x <= y),
    (">", lambda x, y: x > y),
    (">=", lambda x, y: x >= y),
    ("==", lambda x, y: x == y),
    ("!=", lambda x, y: x != y),
]


def random_number(rng: Rng, depth: int, table: torch.Tensor) -> tuple[str, MaskMod]:
    """An expression of q and k with whole numbers as values, and its text."""
    kind = int(rng.integers(4 if depth == 0 else 22))
    number = int(rng.integers(1, 9))
    if kind == 0:
        return "q", lambda b, h, q, k: q
    if kind == 1:
        return "k", lambda b, h, q, k: k
    if kind == 2:
        return "doc[q]", lambda b, h, q, k: table[q]
    if kind == 3:
        return "doc[k]", lambda b, h, q, k: table[k]
    text, of = random_number(rng, depth - 1, table)
    if kind == 4:
        return f"({text} // {number})", lambda b, h, q, k: of(b, h, q, k) // number
    if kind == 5:
        return f"({text} % {number})", lambda b, h, q, k: of(b, h, q, k) % number
    if kind == 6:
        return f"({number} - {text})", lambda b, h, q, k: number - of(b, h, q, k)
    if kind == 7:
        return f"({text} * -{number})", lambda b, h, q, k: of(b, h, q, k) * -number
    if kind == 10:
        return f"abs({text})", lambda b, h, q, k: of(b, h, q, k).abs()
    if kind == 11:
        return f"-{text}", lambda b, h, q, k: -of(b, h, q, k)
    if kind == 12:
        return f"clamp({text}, 1, {number})", lambda b, h, q, k: torch.clamp(of(b, h, q, k), 1, number)
    if kind == 16:
        return f"({text} >> {number % 4})", lambda b, h, q, k: of(b, h, q, k) >> number % 4
    if kind == 17:
        return f"({text} & 7)", lambda b, h, q, k: (of(b, h, q, k) & 7) - (of(b, h, q, k) & ~3)
    if kind == 18:  # also from the end of the table
        return f"doc[{text} % 40 - {number}]", lambda b, h, q, k: table[of(b, h, q, k) % 40 - number]
    if kind == 19:
        return f"div({text}, -{number})", lambda b, h, q, k: torch.div(of(b, h, q, k), -number, rounding_mode="trunc")
    if kind == 20:
        return f"({text} > {number}).int()", lambda b, h, q, k: (of(b, h, q, k) > number).int() * number
    if kind == 21:
        return f"plane[q, {number}k]", lambda b, h, q, k: table[:40].reshape(8, 5)[q // 5, (k // number) % 5]
    other_text, other = random_number(rng, depth - 1, table)
    if kind in (13, 14):
        name, function = ("minimum", torch.minimum) if kind == 13 else ("maximum", torch.maximum)
        return f"{name}({text}, {other_text})", lambda b, h, q, k: function(of(b, h, q, k), other(b, h, q, k))
    if kind == 15:
        return f"where({text} > {other_text})", lambda b, h, q, k: torch.where(
            of(b, h, q, k) > other(b, h, q, k), of(b, h, q, k), other(b, h, q, k) + number
        )
    if kind == 8:
        return f"({text} + {other_text})", lambda b, h, q, k: of(b, h, q, k) + other(b, h, q, k)
    return f"({text} - {other_text})", lambda b, h, q, k: of(b, h, q, k) - other(b, h, q, k)


def random_mod(rng: Rng, table: torch.Tensor, depth: int = 3) -> tuple[str, MaskMod]:
    """An expression of q and k with booleans as values, and its text."""
    kind = int(rng.integers(6)) if depth else 0
    if kind <= 1:
        left_text, left = random_number(rng, 2, table)
        right_text, right = random_number(rng, 2, table)
        sign, compare = COMPARE[int(rng.integers(len(COMPARE)))]
        return f"({left_text} {sign} {right_text})", lambda b, h, q, k: compare(left(b, h, q, k), right(b, h, q, k))
    text, of = random_mod(rng, table, depth - 1)
    if kind == 2:
        return f"~{text}", lambda b, h, q, k: ~of(b, h, q, k)
    other_text, other = random_mod(rng, table, depth - 1)
    if kind == 3:
        return f"({text} | {other_text})", lambda b, h, q, k: of(b, h, q, k) | other(b, h, q, k)
    if kind == 4:
        return f"({text} ^ {other_text})", lambda b, h, q, k: of(b, h, q, k) ^ other(b, h, q, k)
    return f"({text} & {other_text})", lambda b, h, q, k: of(b, h, q, k) & other(b, h, q, k)


def everywhere(mod: MaskMod, num_q: int, num_k: int) -> np.ndarray:
    """``[num_q, num_k]`` bool, from the plain function of two grids."""
    q, k = torch.arange(num_q)[:, None], torch.arange(num_k)[None, :]
    return mod(0, 0, q, k).expand(num_q, num_k).numpy()


@pytest.mark.parametrize("num_cases", CASES)
def test_what_is_proved_of_tiles_holds(num_cases: int) -> None:
    rng = np.random.default_rng(41)
    decided = 0
    for _ in range(num_cases):
        num_q, num_k = rng.integers(1, 40, 2).tolist()
        table = torch.from_numpy(np.sort(rng.integers(-3, 6, 40)) if rng.integers(2) else rng.integers(-3, 6, 40))
        text, mod = random_mod(rng, table)
        dense = everywhere(mod, num_q, num_k)
        size = int(rng.integers(1, 12))
        tiles = [flex._tile_ranges(length, size) for length in (num_q, num_k)]
        always, ever = tile_bounds(mod, 0, 0, *(torch.from_numpy(ranges) for ranges in tiles))
        for row, (q0, q1) in enumerate(tiles[0].tolist()):
            for column, (k0, k1) in enumerate(tiles[1].tolist()):
                cells = dense[q0:q1, k0:k1]
                assert cells.all() or not always[row, column], (text, size)
                assert not cells.any() or ever[row, column], (text, size)
        decided += int((always == ever).sum())
    assert decided > num_cases  # it does prove something


@pytest.mark.parametrize("num_cases", CASES)
def test_mask_mod_exactly(num_cases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(42)
    for _ in range(num_cases):
        monkeypatch.setattr(flex, "_TILE", int(rng.integers(2, 12)))
        num_q, num_k = rng.integers(1, 40, 2).tolist()
        text, mod = random_mod(rng, torch.from_numpy(rng.integers(-3, 6, 40)))
        mask = AttnMask.from_mask_mod(mod, num_q, num_k)
        mask.validate()
        np.testing.assert_array_equal(mask.to_dense(), everywhere(mod, num_q, num_k), err_msg=text)


DOCUMENTS = torch.repeat_interleave(torch.arange(5), torch.tensor([100, 1, 160, 50, 39]))
READABLE: dict[str, MaskMod] = {
    "causal": lambda b, h, q, k: q >= k,
    "documents": lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k),
    "documents of batches": lambda b, h, q, k: (DOCUMENTS[None][b, q] == DOCUMENTS[None][b, k]) & (q >= k),
    "and_masks": and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k <= 30),
    "or_masks": or_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: k < 77),
    "noop_mask": noop_mask,
    "distance": lambda b, h, q, k: (q // 20 - k // 20).abs() <= 3,
    "where": lambda b, h, q, k: torch.where(DOCUMENTS[q] == DOCUMENTS[k], q >= k, k < 3),
    "window": lambda b, h, q, k: (q - k <= 30) & (k - q <= 20),
    "prefix": lambda b, h, q, k: (k < 77) | (q >= k),
    "blocks": lambda b, h, q, k: q // 50 >= k // 50,
    "logical": lambda b, h, q, k: torch.logical_and(q >= k, torch.logical_not(k == 5)),
    "all of them": lambda b, h, q, k: torch.ones((), dtype=torch.bool),
    "table of cells": lambda b, h, q, k: (DOCUMENTS[:300, None] >= DOCUMENTS[None, :300])[q % 300, k],
    "wraps around": lambda b, h, q, k: DOCUMENTS[k - 1] == 4,
}
UNREADABLE: dict[str, MaskMod] = {
    "any": lambda b, h, q, k: (k == torch.tensor([3, 200, 7])).any() | (q == k),
    "float": lambda b, h, q, k: (q - k) * 0.5 <= 10.0,
}


@pytest.mark.parametrize("name", [*READABLE, *UNREADABLE])
def test_functions_as_people_write_them(name: str) -> None:
    mod = {**READABLE, **UNREADABLE}[name]
    num_q, num_k = 350, 300
    expected = create_mask(mod, 1, 1, num_q, num_k, device="cpu")[0, 0].expand(num_q, num_k)
    given = {"num_batches": 1} if "batches" in name else {}
    with pytest.warns(UserWarning, match="cannot be proved") if name in UNREADABLE else nullcontext():
        mask = AttnMask.from_mask_mod(mod, num_q, num_k, num_heads=1 if given else None, **given)
    np.testing.assert_array_equal(mask.to_dense(), expected.numpy())
    tiles, zero = torch.tensor([[0, 128], [128, 256], [256, 300]]), torch.tensor(0)
    if name in READABLE:
        tile_bounds(mod, zero, zero, tiles, tiles)
    else:
        with pytest.raises(NotReadableError):
            tile_bounds(mod, zero, zero, tiles, tiles)


def test_numbers_that_wrap_around_are_not_trusted() -> None:
    narrow = torch.full((4,), 100, dtype=torch.int8)
    tiles = torch.tensor([[0, 4]])
    for mod in (
        lambda b, h, q, k: narrow[q] + narrow[k] > 0,
        lambda b, h, q, k: (q + (1 << 30)) * 2 > 0,
        lambda b, h, q, k: (q >= k) + (k >= q) == 2,
    ):
        with pytest.raises(NotReadableError):
            tile_bounds(mod, 0, 0, tiles, tiles)
        expected = create_mask(mod, 1, 1, 4, 4, device="cpu")[0, 0]
        with pytest.warns(UserWarning, match="cannot be proved"):
            np.testing.assert_array_equal(AttnMask.from_mask_mod(mod, 4).to_dense(), expected.numpy())


def test_a_long_document_mask_is_few_rows() -> None:
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([3000, 10, 990, 192]))
    edges = [0, 3000, 3010, 4000, 4192]
    mask = AttnMask.from_mask_mod(
        lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k) & (q - k < 500), edges[-1]
    )
    expected = AttnMask.varlen(edges, window_size=(499, 0))
    assert mask.attends_same(expected)
    assert len(mask.bands) == len(expected.bands)


@pytest.mark.parametrize("num_cases", CASES)
def test_mask_mod_and_block_mask_there_and_back(num_cases: int) -> None:
    rng = np.random.default_rng(43)
    for _ in range(num_cases):
        mask = any_mask(rng)
        if not mask.num_q or not mask.num_k:
            continue
        dense = mask.to_dense()
        np.testing.assert_array_equal(everywhere(mask.to_mask_mod(), mask.num_q, mask.num_k), dense)
        size = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
        block_mask = mask.to_block_mask(size)
        np.testing.assert_array_equal(AttnMask.from_block_mask(block_mask).to_dense(), dense)


@pytest.mark.parametrize("num_cases", CASES)
def test_block_masks_of_flex_attention(num_cases: int) -> None:
    rng = np.random.default_rng(44)
    for _ in range(num_cases):
        num_q, num_k = rng.integers(1, 40, 2).tolist()
        text, mod = random_mod(rng, torch.from_numpy(rng.integers(-3, 6, 64)), depth=2)
        theirs = create_block_mask(mod, None, None, num_q, num_k, device="cpu", BLOCK_SIZE=8)
        mask = AttnMask.from_block_mask(theirs)
        np.testing.assert_array_equal(mask.to_dense(), everywhere(mod, num_q, num_k), err_msg=text)
        ours = mask.to_block_mask(8)
        np.testing.assert_array_equal(ours.to_dense()[0, 0].numpy(), theirs.to_dense()[0, 0].numpy(), err_msg=text)


def test_full_blocks_are_full_whatever_the_function_says() -> None:
    ones, at = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(ones * 0, at, ones, at, BLOCK_SIZE=4, mask_mod=lambda b, h, q, k: q >= k)
    assert AttnMask.from_block_mask(block_mask) == AttnMask.full(4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_computes_what_the_mask_attends() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    mask = AttnMask.varlen([0, 50, 130, 200], window_size=(40, 3))
    q, k, v = torch.randn(3, 1, 2, 200, 8, generator=torch.Generator().manual_seed(0)).unbind()
    out = flex_attention(q, k, v, block_mask=mask.to_block_mask(64))
    dense = torch.from_numpy(mask.to_dense())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(out, expected)


def test_batches_and_heads() -> None:
    lengths = torch.tensor([5, 9])

    def by_batch(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k < lengths[b]

    with pytest.raises(ValueError, match=r"reads b, so that .* give num_batches, and"):
        AttnMask.from_mask_mod(by_batch, 12)
    with pytest.raises(ValueError, match=r"reads b and h, so that .* give num_batches and num_heads"):
        AttnMask.from_mask_mod(lambda b, h, q, k: k < lengths[b] + h, 12)
    assert AttnMask.from_mask_mod(by_batch, 12, num_batches=1) == AttnMask.full(12).restrict(None, (0, 5))
    with pytest.raises(ValueError, match="different cells for different batches or heads"):
        AttnMask.from_mask_mod(by_batch, 12, num_batches=2, num_heads=1)
    assert AttnMask.from_mask_mod(by_batch, 12, num_batches=1, num_heads=3) == AttnMask.full(12, 12).restrict(
        None, (0, 5)
    )
    with pytest.raises(ValueError, match="different cells"):
        AttnMask.from_block_mask(create_block_mask(by_batch, 2, 1, 12, 12, device="cpu"), num_heads=1)
    with pytest.raises(ValueError, match="give num_batches, and"):
        AttnMask.from_block_mask(create_block_mask(by_batch, 1, 1, 12, 12, device="cpu"))
    same = create_block_mask(lambda b, h, q, k: (q >= k) & (b >= 0), 2, 3, 12, 12, device="cpu")
    assert AttnMask.from_block_mask(same) == AttnMask.causal(12)


@pytest.mark.parametrize(
    "mod",
    [
        lambda b, h, q, k: (h == 0) & (q >= k),
        lambda b, h, q, k: (q >= k) | (b != 0),
        lambda b, h, q, k: (q >= k) & (h in {0, 3}),
        lambda b, h, q, k: q >= k if b is not None and not h else k < 3,
        lambda b, h, q, k: q >= k + h,
        and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: h < 1),
    ],
)
def test_a_function_that_reads_b_or_h_is_never_taken_for_one_that_does_not(mod: MaskMod) -> None:
    with pytest.raises(ValueError, match=r"give num_(batches|heads)|without a branch on their values"):
        AttnMask.from_mask_mod(mod, 12)


@pytest.mark.parametrize(
    ("mod", "complaint"),
    [
        (lambda b, h, q, k: True if q >= k else False, "without a branch on their values"),  # noqa: SIM210
        (lambda b, h, q, k: (q >= k) and (q - k < 3), "without a branch on their values"),
        (lambda b, h, q, k: 2 * (q >= k), "it returns torch.int64, not booleans"),
        (lambda b, h, q, k: None, "it returns NoneType, not booleans"),
        (lambda q, k: q >= k, "takes 2 positional arguments but 4 were given"),
        (lambda b, h, q, k: DOCUMENTS[:100][q] == 0, "indices below 150 queries and 150 keys.*IndexError"),
        (lambda b, h, q, k: torch.rand(()) < 0.5, "random"),
        (None, "not callable"),
    ],
)
def test_what_is_no_mask_mod_is_told(mod: MaskMod, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AttnMask.from_mask_mod(mod, 150)


def test_what_is_no_block_mask_is_told() -> None:
    with pytest.raises(ValueError, match="must be a BlockMask of flex_attention, got function"):
        AttnMask.from_block_mask(lambda b, h, q, k: q >= k)
    with pytest.raises(ValueError, match="num_heads must be an int of 1 or more, got 0"):
        AttnMask.from_mask_mod(lambda b, h, q, k: q >= h, 8, num_batches=1, num_heads=0)


def test_a_function_of_no_cells_is_not_asked() -> None:
    assert AttnMask.from_mask_mod(lambda b, h, q, k: DOCUMENTS[:0][q] == 0, 0, 5) == AttnMask.full(0, 5)
