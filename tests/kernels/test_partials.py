"""Merging partial results: the formula, its neutral element, and rows without keys on either side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magi_attention.kernels.interface import Partial
from magi_attention.kernels.partials import empty_partial, finite_lse, merge_
from magi_attention.kernels.precision import accumulation_dtype


def attend(logits: Tensor, v: Tensor) -> Partial:
    """Attention of given logits ``[num_q, hq, keys]`` over values ``[keys, dv]``."""
    lse = torch.logsumexp(logits, dim=-1)
    probs = torch.exp(logits - finite_lse(lse).unsqueeze(-1))
    return Partial(probs @ v, lse, logits.flatten(0, 1).amax(dim=(0, 1)).expand(logits.shape[1]).clone())


def make() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(5, 2, 12, generator=generator, dtype=torch.float64)
    logits[0, :, :7] = -math.inf  # a row without keys on the left,
    logits[1, :, 7:] = -math.inf  # on the right,
    logits[2] = -math.inf  # on both
    return logits, torch.randn(12, 3, generator=generator, dtype=torch.float64)


def test_merge_is_attention_over_all_keys() -> None:
    logits, v = make()
    whole = attend(logits, v)
    for first, second in ((slice(0, 7), slice(7, 12)), (slice(7, 12), slice(0, 7))):
        into = attend(logits[..., first], v[first])
        assert merge_(into, attend(logits[..., second], v[second])) is into
        for name, value in into._asdict().items():
            torch.testing.assert_close(value, getattr(whole, name), msg=lambda m, name=name: f"{name}: {m}")
    assert (into.out[2] == 0).all() and (into.lse[2] == -math.inf).all()


def test_extreme_lses_do_not_overflow() -> None:
    out, v = torch.ones(3, 1, 2), torch.full((3, 1, 2), 3.0)
    into = Partial(out, torch.tensor([[1e30], [-1e30], [88.0]]), None)
    merge_(into, Partial(v, torch.tensor([[-1e30], [1e30], [88.0]]), None))
    torch.testing.assert_close(into.out[:, 0, 0], torch.tensor([1.0, 3.0, 2.0]), rtol=1e-5, atol=0)
    assert torch.equal(into.lse[:2], torch.full((2, 1), 1e30))


def test_the_empty_partial_changes_nothing() -> None:
    logits, v = make()
    whole = attend(logits, v)
    empty = empty_partial(torch.zeros(5, 2, 8, dtype=torch.float64), 3, with_max_logits=True)
    for value, expected in zip(merge_(empty, whole), whole, strict=True):
        assert torch.equal(value, expected)
    other = empty_partial(torch.zeros(5, 2, 8, dtype=torch.float64), 3, with_max_logits=True)
    for value, expected in zip(merge_(empty, other), whole, strict=True):
        assert torch.equal(value, expected)


def test_dtypes() -> None:
    assert [accumulation_dtype(d) for d in (torch.float16, torch.bfloat16, torch.float32)] == [torch.float32] * 3
    assert accumulation_dtype(torch.float64) == torch.float64
    half = empty_partial(torch.zeros(2, 2, 8).half(), 4, torch.float16, with_max_logits=False)
    assert half.out.dtype == torch.float16 and half.lse.dtype == torch.float32 and half.max_logits is None
