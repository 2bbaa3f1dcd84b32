"""`row_dots`: the kernel (interpreted where there is no GPU) and torch's functions, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from magi_attention.kernels.row_dots import row_dots
from magi_attention.kernels.triton.row_dots import row_dots_on_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (37, 3, 24), (1000, 5, 128), (9, 2, 200), (0, 2, 16), (4, 0, 16)], ids=str
)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_row_dots(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:2], 2 * shape[2], generator=generator)
    out = wide[..., ::2].to(dtypes[0]).to(DEVICE)
    by_head = torch.randn(shape[1], shape[0], shape[2], generator=generator).to(dtypes[1]).to(DEVICE)
    variants = [
        (out, by_head.transpose(0, 1)),
        (out, by_head.transpose(0, 1).contiguous()),
        (out, torch.ones(1, 1, 1, device=DEVICE).expand(*shape)),  # dout as autograd makes it from a sum: strides of 0
    ]
    for one, other in variants:
        expected = (one.double() * other.double()).sum(-1)
        for run in (row_dots, row_dots_on_device):
            actual = run(one, other)
            assert actual.dtype == torch.float32 and actual.is_contiguous()
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64() -> None:
    out, dout = (torch.randn(5, 2, 8, dtype=torch.float64, device=DEVICE) for _ in range(2))
    assert torch.equal(row_dots(out, dout), (out * dout).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_zeros_ignore_what_they_are_multiplied_by(dtype: torch.dtype) -> None:
    """Rows that attend nothing have out 0, and may have any gradient; a row with a number in it may not."""
    generator = torch.Generator().manual_seed(0)
    out, dout = (torch.randn(64, 3, 24, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    out[7], out[9, 1], out[11, 2, 5] = 0.0, -0.0, 0.0
    expected = (out.double() * dout.double()).sum(-1)
    dout[7], dout[9, 1, ::2], dout[11, 2, 5] = torch.nan, torch.inf, torch.nan
    expected[11, 2] = torch.nan
    for run in (row_dots, row_dots_on_device):
        torch.testing.assert_close(run(out, dout).double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_float64_rows_of_zeros() -> None:
    out, dout = torch.randn(2, 5, 2, 8, dtype=torch.float64, device=DEVICE)
    out[3], dout[3] = 0.0, torch.nan
    dots = row_dots(out, dout)
    assert (dots[3] == 0).all() and torch.equal(dots[:3], (out * dout).sum(-1)[:3])
