"""One dispatch for several masks."""

import numpy as np
import pytest
import torch

from magi_attention.api import dispatch, magi_attn_joint_keys, plan_of, undispatch
from magi_attention.config import DispatchConfig, DistAttnConfig, MinHeapDispatchAlg
from magi_attention.mask import AttnMask
from magi_attention.plan import build_plan
from magi_attention.plan.joint import imbalances, joint_layout
from magi_attention.testing.plan_check import check_cells, check_deliveries

TOTAL = 256


def masks() -> list[AttnMask]:
    """One causal layer, and one in which only the first half attends: a dispatch for either alone ruins the other."""
    return [
        AttnMask.from_slices([[0, TOTAL]], [[0, TOTAL]], "causal"),
        AttnMask.from_slices([[0, TOTAL // 2]], [[0, TOTAL]], "full", TOTAL, TOTAL),
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 5.0), (10.0, 1.0)])
def test_weighted_sum_and_each_mask_are_balanced(weights: tuple[float, float]) -> None:
    config = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=4))
    layout = joint_layout(masks(), weights, 4, config)
    plans = [build_plan(mask, 4, config, q_layout=layout) for mask in masks()]
    weighted = sum(weight * plan.areas for weight, plan in zip(weights, plans, strict=True))
    assert np.max(weighted) / np.mean(weighted) < 1.1
    for plan in plans:
        assert plan.imbalance < 1.2
        check_cells(plan)
        check_deliveries(plan)
    alone = build_plan(
        masks()[1], 4, DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=4, alg=MinHeapDispatchAlg()))
    )
    areas = np.stack([np.bincount(np.arange(1), minlength=1)])
    assert imbalances(areas, np.zeros(1, np.int64), 1) == [1.0]
    assert build_plan(masks()[0], 4, config, q_layout=alone.q_layout).imbalance >= min(p.imbalance for p in plans)


def test_keys() -> None:
    keys = magi_attn_joint_keys(masks(), [1, 5], 2, 1, 8, chunk_size=4)
    assert keys == magi_attn_joint_keys(masks(), [1, 5], 2, 1, 8, chunk_size=4)
    assert plan_of(keys[0]).q_layout is plan_of(keys[1]).q_layout
    x = torch.randn(TOTAL, 2)
    assert torch.equal(undispatch(dispatch(x, keys[0]), keys[1]), x)
    with pytest.raises(ValueError, match="equally many"):
        magi_attn_joint_keys(masks(), [1], 2, 1, 8)
    with pytest.raises(ValueError, match="one positive weight for each"):
        magi_attn_joint_keys(masks(), [1, 0], 2, 1, 8)
    with pytest.raises(ValueError, match="same tokens"):
        magi_attn_joint_keys([masks()[0], AttnMask.from_slices([[0, 8]], [[0, 8]], "full")], [1, 1], 2, 1, 8)
