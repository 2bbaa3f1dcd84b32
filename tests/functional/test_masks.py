"""What is kept of the tables of a call: the mask of these very tensors, as they are now."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from magi_attention.functional import masks
from magi_attention.functional.masks import kernel_mask
from magi_attention.kernels.interface import DeviceMask


def tables() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor([[0, 4], [4, 9]], dtype=torch.int32),
        torch.tensor([[0, 4], [0, 9]], dtype=torch.int32),
        torch.tensor([1, 0], dtype=torch.int32),
    )


def device_mask(q_ranges: Tensor, k_ranges: Tensor, types: Tensor | None, num_q: int = 9, num_k: int = 9) -> DeviceMask:
    """As of tables that are not on the CPU."""
    return masks._device_mask(q_ranges, k_ranges, types, num_q, num_k)


def test_the_same_tensors_find_their_mask() -> None:
    q_ranges, k_ranges, types = tables()
    mask = device_mask(q_ranges, k_ranges, types)
    assert device_mask(q_ranges, k_ranges, types) is mask
    others = [
        (q_ranges.clone(), k_ranges, types),
        (q_ranges, k_ranges.clone(), types),
        (q_ranges, k_ranges, types.clone()),
        (q_ranges, k_ranges, None),
        (q_ranges, k_ranges, types, 10),
        (q_ranges, k_ranges, types, 9, 10),
    ]
    found = [device_mask(*other) for other in others]  # type: ignore[arg-type]
    assert len({id(one) for one in (mask, *found)}) == 1 + len(others)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_after_a_write_it_is_another(written: int) -> None:
    given = tables()
    mask = device_mask(*given)
    given[written][0] = 0
    after = device_mask(*given)
    assert after is not mask
    assert after.bands.tolist() == kernel_mask(*given, 9, 9).bands.tolist()


def test_what_is_kept_goes_with_the_tensors() -> None:
    given = tables()
    mask = weakref.ref(device_mask(*given))
    assert mask() is not None
    del given
    gc.collect()
    assert mask() is None


def test_few_are_kept_for_one_tensor() -> None:
    q_ranges, k_ranges, types = tables()
    kept = [weakref.ref(device_mask(q_ranges, k_ranges, types, num_k)) for num_k in range(9, 20)]
    gc.collect()
    assert sum(one() is not None for one in kept) == masks._MOST_KEPT
    last = kept[-1]()
    assert device_mask(q_ranges, k_ranges, types, 19) is last


def test_writes_that_are_not_counted() -> None:
    with torch.inference_mode():
        given = tables()
        assert device_mask(*given) is not device_mask(*given)


def test_read_on_the_host_it_is_cut_to_the_tensors() -> None:
    wide = torch.tensor([[-3, 4], [4, 99]], dtype=torch.int32)
    _, k_ranges, types = tables()
    mask = DeviceMask(wide, k_ranges, types, 9, 9)
    assert mask.bands.tolist() == kernel_mask(*tables(), 9, 9).bands.tolist()
    assert mask.bands is mask.bands
