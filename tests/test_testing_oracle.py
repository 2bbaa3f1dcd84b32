"""The oracle against PyTorch's own attention, against finite differences, and against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from magi_attention.testing.mask_families import MASK_FAMILIES, SELF_ATTENTION_FAMILIES, Slices
from magi_attention.testing.oracle import AttnResult, attention_oracle


def draw(num_q: int, num_k: int, hq: int, hk: int, d: int, dv: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((num_q, hq, d), (num_k, hk, d), (num_k, hk, dv), (num_q, hq, dv))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("family", ["causal", "window", "cross_documents", "block_causal"])
def test_equals_sdpa(family: str) -> None:
    slices = MASK_FAMILIES[family](40)
    attended = slices.dense()
    attended[:, 0] = True  # SDPA has no answer for a row without keys
    q, k, v, dout = draw(slices.num_q, slices.num_k, 4, 2, 8, 6)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in leaves), attn_mask=attended, enable_gqa=True)
    expected = AttnResult(out.transpose(0, 1), None, None, *torch.autograd.grad(out, leaves, dout.transpose(0, 1)))
    oracle = attention_oracle(q, k, v, attended, dout=dout)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(oracle, name), getattr(expected, name))


@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("softcap", [0.0, 1.2])
def test_gradients_by_finite_differences(layout: str, softcap: float) -> None:
    slices = MASK_FAMILIES["empty_rows"](16)
    q, k, v, dout = draw(16, 16, 2, 1, 3, 2)
    sink = torch.randn(
        (2, 2) if layout == "sh" else (16, 2, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    options = {"sink_layout": layout, "softcap": softcap, "softmax_scale": 0.7}
    result = attention_oracle(q, k, v, slices.dense(), dout=dout, sink=sink, **options)
    step = 1e-6
    for name, x in (("dq", q), ("dk", k), ("dv", v), ("dsink", sink)):
        gradient = getattr(result, name)
        for at in range(0, x.numel(), 5):
            nudged = []
            for sign in (1, -1):
                tensors = [t.clone() for t in (q, k, v, sink)]
                tensors[["dq", "dk", "dv", "dsink"].index(name)].view(-1)[at] += sign * step
                out = attention_oracle(*tensors[:3], slices.dense(), sink=tensors[3], **options).out
                assert out is not None
                nudged.append((out * dout).sum().item())
            difference = (nudged[0] - nudged[1]) / (2 * step)
            assert gradient.flatten()[at].item() == pytest.approx(difference, abs=1e-7), f"{name}[{at}]"


def test_by_hand() -> None:
    """Two keys of logits 1 and 3 and a sink of 2; the second query attends nothing."""
    q = torch.tensor([[[1.0]], [[1.0]]])
    k, v = torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[10.0]], [[20.0]]])
    attended = torch.tensor([[True, True], [False, False]])
    sink = torch.tensor([[2.0]])
    result = attention_oracle(q, k, v, attended, sink=sink, softmax_scale=1.0)
    total = math.e + math.e**3 + math.e**2
    assert result.out is not None and result.lse is not None and result.max_logits is not None
    assert result.out.flatten().tolist() == pytest.approx([(10 * math.e + 20 * math.e**3) / total, 0])
    assert result.lse.flatten().tolist() == pytest.approx([math.log(total), 2.0])
    assert result.max_logits.item() == 3.0
    without = attention_oracle(q, k, v, attended, softmax_scale=1.0)
    assert without.lse is not None and without.lse[1].item() == -math.inf


def test_catalogue() -> None:
    """Families list each cell once at any length, stay in bounds, and hold what they are there for."""
    for make in MASK_FAMILIES.values():
        for num_tokens in (*range(16, 40), 193):
            slices = make(num_tokens)
            slices.dense()
            for q0, q1, k0, k1, kind in slices.rows:
                assert 0 <= q0 <= q1 <= slices.num_q and 0 <= k0 <= k1 <= slices.num_k and 0 <= kind <= 3
    kinds = {kind for make in MASK_FAMILIES.values() for kind in make(193).types}
    assert kinds == {0, 1, 2, 3}
    assert set(MASK_FAMILIES) - set(SELF_ATTENTION_FAMILIES) == {
        "more_queries",
        "more_keys",
        "cross_documents",
        "random_cross",
    }
    with pytest.raises(AssertionError, match="lists a cell twice"):
        Slices(((0, 4, 0, 4, 0), (3, 5, 3, 5, 0)), 6, 6).dense()
