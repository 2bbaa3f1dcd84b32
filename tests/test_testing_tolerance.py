"""The tolerance rule must pass what is as exact as plain PyTorch, and fail what is not."""

from __future__ import annotations

import math

import pytest
import torch

from magi_attention.testing.tolerance import assert_as_exact_as

ORACLE = torch.linspace(-2.0, 2.0, 101, dtype=torch.float64)
PLAIN = ORACLE + 1e-5


def test_up_to_twice_the_plain_error_passes() -> None:
    assert_as_exact_as((ORACLE - 1.9e-5).float(), ORACLE, PLAIN)
    with pytest.raises(
        AssertionError, match=r"out is off by 2\.\d+e-05 at \(\d+,\).*plain PyTorch is off by 1\.000e-05"
    ):
        assert_as_exact_as((ORACLE - 2.2e-5).float(), ORACLE, PLAIN, "out")


def test_one_wrong_element_fails() -> None:
    actual = ORACLE.float()
    actual[17] += 1e-3
    with pytest.raises(AssertionError, match=r"at \(17,\)"):
        assert_as_exact_as(actual, ORACLE, PLAIN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_once_passes_though_plain_is_exact_and_twice_that_fails(dtype: torch.dtype) -> None:
    exact = torch.linspace(0.5, 1.0, 1001, dtype=torch.float64)
    assert_as_exact_as(exact.to(dtype), exact, exact)
    spoiled = exact.clone()
    spoiled[-1] += 8 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact_as(spoiled.to(dtype), exact, exact)


def test_float64_is_held_to_float64() -> None:
    assert_as_exact_as(ORACLE + 1e-13, ORACLE, ORACLE)
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact_as(ORACLE + 1e-11, ORACLE, ORACLE)


def test_nan_and_infinities() -> None:
    oracle = torch.tensor([0.0, -math.inf, 1.0], dtype=torch.float64)
    assert_as_exact_as(oracle.float(), oracle, oracle)
    for wrong, message in (
        ([0.0, math.nan, 1.0], r"NaN at 1 places, first \(1,\)"),
        ([0.0, math.inf, 1.0], r"inf at \(1,\), expected -inf"),
        ([0.0, -100.0, 1.0], r"-100.0 at \(1,\), expected -inf"),
        ([-math.inf, -math.inf, 1.0], r"-inf at \(0,\), expected 0"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_as_exact_as(torch.tensor(wrong), oracle, oracle)
    # A plain run that overflows excuses nothing.
    with pytest.raises(AssertionError, match="off by"):
        assert_as_exact_as(torch.tensor([0.5, -math.inf, 1.0]), oracle, torch.tensor([math.nan, -math.inf, 1.0]))


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"shape \[101\], expected \[1, 101\]"):
        assert_as_exact_as(ORACLE, ORACLE[None], ORACLE[None])
