"""Several masks over one dispatch, on several ranks: joint keys, and second masks, each against the oracle."""

from __future__ import annotations

import pytest
import torch

from magi_attention.api import (
    calc_attn,
    dispatch,
    magi_attn_joint_keys,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    plan_of,
    undispatch,
)
from magi_attention.mask import AttnMask, causal, varlen
from magi_attention.runtime.key import DistAttnRuntimeKey
from magi_attention.testing.dist import shared_pool
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

TOTAL = 90


def check_layers(keys: list[DistAttnRuntimeKey]) -> None:
    """Rows dispatched once go through a layer of each key; every result and gradient is the oracle's."""
    generator = torch.Generator().manual_seed(1)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(TOTAL, heads, 16, generator=generator, dtype=torch.float64)

    q, k, v, dout = random(4), random(2), random(2), random(4)
    for key in keys:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        # Laid out by the first key, brought back by the last: there is one dispatch.
        local_out, meta = calc_attn(*(dispatch(x, keys[0]) for x in leaves), key)
        out = undispatch(local_out, keys[-1])
        assert meta.lse is not None
        lse = undispatch(meta.lse, keys[-1])
        out.backward(dout)
        actual = AttnResult(out.detach(), lse, None, *(leaf.grad for leaf in leaves), None)
        attended = torch.from_numpy(plan_of(key).mask.to_dense()).bool()
        truth = attention_oracle(q, k, v, attended, dout=dout)
        assert_results_as_exact(actual, truth, plain_result(q, k, v, attended, dout=dout))


def check_joint() -> None:
    windowed = varlen([0, 33, TOTAL], window_size=(7, 0))
    half = AttnMask.from_slices([[0, 40]], [[0, TOTAL]], "full", TOTAL, TOTAL)
    check_layers(magi_attn_joint_keys([causal(TOTAL), windowed, half], [1, 5, 1], 4, 2, 16, chunk_size=3))


def check_second_mask() -> None:
    first = magi_attn_varlen_key([0, 20, TOTAL], [0, 20, TOTAL], 4, 2, 16, causal=True, chunk_size=4)
    second = make_flex_key_for_new_mask_after_dispatch([[0, TOTAL]], [[0, TOTAL]], "full", first)
    third = make_flex_key_for_new_mask_after_dispatch([[80, TOTAL]], [[0, TOTAL]], "causal", first)
    check_layers([first, second, third])


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_joint_keys(num_ranks: int) -> None:
    shared_pool().run(check_joint, num_ranks=num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_second_masks(num_ranks: int) -> None:
    shared_pool().run(check_second_mask, num_ranks=num_ranks)
