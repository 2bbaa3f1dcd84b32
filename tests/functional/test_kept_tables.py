"""Tables that are kept for later calls are plain tensors, whoever looks on when they are made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from magi_attention.api import dispatch, get_position_ids, magi_attn_flex_key
from magi_attention.functional import flex_flash_attn_func
from magi_attention.mask import AttnMask, causal

NUM_TOKENS = 12


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Attend(torch.nn.Module):
    def __init__(self, mask: AttnMask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_flash_attn_func(q, k, v, mask=self.mask)[0]


def inputs(device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(NUM_TOKENS, heads, 8, generator=generator).to(device) for heads in (4, 2, 2)]


@pytest.mark.parametrize("mode", [FakeTensorMode, Looking, torch.inference_mode])
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_mask_first_used_in_a_mode(mode: type, is_kept: bool) -> None:
    attend, expected = Attend(causal(NUM_TOKENS)), Attend(causal(NUM_TOKENS))(*inputs())
    if is_kept:
        attend(*inputs())
    with mode():
        assert attend(*inputs()).shape == expected.shape
    assert torch.equal(attend(*inputs()), expected)


@pytest.mark.parametrize("is_kept", [False, True])
def test_an_exported_mask(is_kept: bool) -> None:
    attend, expected = Attend(causal(NUM_TOKENS)), Attend(causal(NUM_TOKENS))(*inputs())
    if is_kept:
        attend(*inputs())
    exported = torch.export.export(attend, tuple(inputs())).module()
    assert torch.equal(exported(*inputs()), expected)
    assert torch.equal(attend(*inputs()), expected)


@pytest.mark.parametrize("mode", [FakeTensorMode, Looking, torch.inference_mode])
@pytest.mark.parametrize("is_kept", [False, True])
def test_positions_first_asked_for_in_a_mode(mode: type, is_kept: bool) -> None:
    # Padding makes dispatch ask for positions too.
    total = NUM_TOKENS - is_kept
    key = magi_attn_flex_key([[0, total]], [[0, total]], "causal", total, total, 4, 2, 8, chunk_size=5)
    if is_kept:
        get_position_ids(key)
    with mode():
        assert get_position_ids(key).shape == (15,)
    assert type(get_position_ids(key)) is Tensor
    assert torch.equal(dispatch(torch.arange(total), key)[:total], torch.arange(total))


@pytest.mark.parametrize("asked", ["", "bf16"])
def test_meta_tensors(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_PRECISION", asked)
    q, k, v = inputs("meta")
    lists = torch.zeros(3, 2, 1, dtype=torch.int32, device="meta")
    for given in ({"mask": causal(NUM_TOKENS)}, {"index_attn_indices": lists, "q_block_size": 4, "k_block_size": 4}):
        out, meta = flex_flash_attn_func(q, k, v, **given)  # type: ignore[arg-type]
        assert out.is_meta and out.shape == q.shape and out.dtype == q.dtype
        assert meta.lse is not None and meta.lse.shape == q.shape[:2]
