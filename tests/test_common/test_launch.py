"""`Launcher` must never take arguments for alike that Triton would compile different code for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from magi_attention.common.launch import Launcher, likeness

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTEGERS = [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**33, 2**62, 2**63, 2**63 + 16]


def specialised(x: object) -> object:
    """How Triton specialises an argument on NVIDIA's GPUs."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    return native_specialize_impl(CUDABackend, x, False, True, True)


def test_what_is_alike_is_specialised_alike() -> None:
    memory = torch.zeros(64, dtype=torch.float32)
    pointers = [memory[at:].view(dtype) for dtype in (torch.float32, torch.int32) for at in range(5)]
    arguments = [*INTEGERS, True, False, 0.0, 1.0, -2.5, *pointers, memory.double(), memory.bfloat16()]
    for x, y in itertools.combinations(arguments, 2):
        if likeness(x) == likeness(y):
            assert specialised(x) == specialised(y), (x, y)
    assert likeness(pointers[0]) == likeness(pointers[4]) != likeness(pointers[1])
    assert likeness(3) == likeness(5) != likeness(1)


@triton.jit
def _scale_kernel(p_x, p_y, num, factor, BLOCK: tl.constexpr, ADD: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < num) * factor + ADD, mask=o < num)


def test_a_kernel_is_launched_with_what_it_is_given() -> None:
    launch = Launcher(_scale_kernel)
    for num, factor, add, at in [(1, 2.0, 0, 0), (16, 3.0, 1, 0), (16, 4.0, 1, 1), (33, 1.0, 0, 0), (16, 5.0, 1, 0)]:
        x = torch.randn(64, device=DEVICE)[at : at + num]
        y = torch.empty_like(x)
        constants: dict[str, Any] = {"ADD": add, "BLOCK": 16}  # in any order
        launch(triton.cdiv(num, 16), DEVICE, (x, y, num, factor), constants, num_warps=1)
        torch.testing.assert_close(y, x * factor + add)


def test_no_null_address_is_handed_to_a_kernel() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="TwoTensor that has no memory of its own"):
        Launcher(_scale_kernel)(1, DEVICE, (x, TwoTensor(x, x), 4, 1.0), {"ADD": 0, "BLOCK": 16}, num_warps=1)
    with pytest.raises(ValueError, match="no memory of its own"):
        likeness(TwoTensor(x, x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_need_not_be_the_current_one() -> None:
    launch = Launcher(_scale_kernel)
    for device in (torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cuda", 1)):
        x = torch.randn(64, device=device)
        y = torch.empty_like(x)
        launch(4, device, (x, y, 64, 2.0), {"BLOCK": 16, "ADD": 0})
        torch.testing.assert_close(y, x * 2)
    assert torch.cuda.current_device() == 0
