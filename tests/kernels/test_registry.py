"""Which kernel is picked, and what is said where none can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from magi_attention.kernels import registry
from magi_attention.kernels.interface import AttnSettings
from magi_attention.kernels.registry import BACKENDS, load, pick

SETTINGS = AttnSettings(softmax_scale=1.0)


def qkv(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x = torch.zeros(2, 1, 8, dtype=dtype, device=device)
    return x, x, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_a_cpu(dtype: torch.dtype) -> None:
    assert pick(*qkv(dtype), SETTINGS).name == "cpu"


def test_auto_sends_float64_to_the_reference() -> None:
    assert pick(*qkv(torch.float64), SETTINGS).name == "reference"


def test_auto_elsewhere_takes_what_runs_anywhere() -> None:
    assert pick(*qkv(torch.float32, "meta"), SETTINGS).name == "tiled"


def test_auto_passes_over_what_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", "magi_attention.kernels.not_there")
    assert pick(*qkv(torch.float32), SETTINGS).name == "tiled"


def test_auto_without_any_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", "magi_attention.kernels.not_there")
    monkeypatch.setitem(registry._PREFERRED, "cpu", ("cpu",))
    with pytest.raises(ValueError, match=r"no attention backend can serve torch.float32 tensors on cpu: .*not_there"):
        pick(*qkv(torch.float32), SETTINGS)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_carry_their_name(name: str) -> None:
    assert load(name).name == name


def test_asking_by_name() -> None:
    for name in ("reference", "tiled", "cpu"):
        assert pick(*qkv(torch.float32), SETTINGS, name=name).name == name
    assert pick(*qkv(torch.float64), SETTINGS, name="tiled").name == "tiled"


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="there is no attention backend 'cuda'; the backends are auto, reference"):
        pick(*qkv(torch.float32), SETTINGS, name="cuda")


def test_a_name_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "other", "magi_attention.kernels.not_there")
    with pytest.raises(ValueError, match=r"'other' cannot be imported here: .*not_there"):
        pick(*qkv(torch.float32), SETTINGS, name="other")


def test_a_name_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"'cpu' cannot serve this call: .*got tensors on meta"):
        pick(*qkv(torch.float32, "meta"), SETTINGS, name="cpu")
