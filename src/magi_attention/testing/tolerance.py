"""How far a result may be from the truth: no further than twice what plain PyTorch of the same precision is.

The rule is flash-attention's: the error against a float64 oracle, in the largest norm, is held to a multiple of the error that
an unfused low-precision run of the same formula makes, plus a rounding floor, never to a share of mismatches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as(
    actual: Tensor, oracle: Tensor, plain: Tensor, name: str = "result", *, factor: float = 2.0, exponent: float = 0.0
) -> None:
    """AssertionError unless ``max|actual - oracle| <= factor * max|plain - oracle| + floor``.

    Args:
        actual: the result under test.
        oracle: the same in float64.
        plain: the same by plain PyTorch in the precision of the inputs (for results that are kept in float32, like lse: in float32).
        exponent: the largest ``|lse|``, where ``actual`` is a sum over ``exp(s - lse)``: with lse kept in float32 each term is off by its
            share ``exponent`` of a rounding, which a softmax that normalises itself is not.

    The floor, with ``largest`` the largest true value: one rounding of it to ``actual.dtype``, ``exponent`` roundings of it to float32, and
    four of 1 to float32, for inputs of unit variance: what summing in another order costs where the plain run happens to be exact.

    A float64 result has no truth above it: it is held to 512 roundings (1.1e-13) of ``largest + 1``. Infinite values must be the same
    in both, and nothing may be NaN.
    """
    assert actual.shape == oracle.shape, f"{name} has shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if not actual.numel():
        return
    dtype, is_double = actual.dtype, actual.dtype == torch.float64
    actual, plain, oracle = (x.detach().to(oracle.device, torch.float64) for x in (actual, plain, oracle))
    assert not oracle.isnan().any(), f"the oracle of {name} is NaN"
    if actual.isnan().any():
        raise AssertionError(f"{name} is NaN at {actual.isnan().sum()} places, first {_first(actual.isnan())}")
    infinite = oracle.isinf() | actual.isinf()
    if not torch.equal(actual[infinite], oracle[infinite]):
        wrong = infinite & (actual != oracle)
        at = _first(wrong)
        raise AssertionError(
            f"{name} is {actual[at].item()} at {at}, expected {oracle[at].item()} ({wrong.sum()} such)"
        )
    error = (actual - oracle).masked_fill(infinite, 0.0).abs()
    plain_error = (plain - oracle).masked_fill(infinite | ~plain.isfinite(), 0.0).abs().max().item()
    largest = oracle.masked_fill(infinite, 0.0).abs().max().item()
    if is_double:
        bound = 512 * torch.finfo(torch.float64).eps * (largest + 1)
    else:
        floor = torch.finfo(dtype).eps * largest + torch.finfo(torch.float32).eps * (4 + exponent * largest)
        bound = factor * plain_error + floor
    if error.max().item() > bound:
        at = _first(error == error.max())
        raise AssertionError(
            f"{name} is off by {error.max().item():.3e} at {at}: {actual[at].item():.6e}, expected {oracle[at].item():.6e}; allowed is "
            f"{bound:.3e} (plain PyTorch is off by {plain_error:.3e}; the largest value is {largest:.3e})"
        )


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())
