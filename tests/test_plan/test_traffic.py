"""Rows counted without a table of transfers are those of the table, and what is predicted from them is what the plan gives."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.config import OverlapConfig
from magi_attention.mask import AttnMask, causal, varlen
from magi_attention.plan import build_plan
from magi_attention.plan.cost import Heads, cost_of
from magi_attention.plan.predicted import prediction, prediction_of_one_stage
from magi_attention.plan.traffic import rows_moved

MASKS = {
    "causal": causal(5000),
    "documents": varlen([0, 300, 1024, 1030, 2048, 5000], causal=True),
    "full documents": varlen([0, 700, 2100, 5000]),
    "window": varlen([0, 5000], window_size=(300, 0)),
    "rows that ask twice": AttnMask.from_slices(
        [[0, 2000], [0, 2000], [3000, 5000]],
        [[0, 1000], [2000, 5000], [100, 200]],
        ["full", "causal", "full"],
        5000,
        5000,
    ),
    "nothing": AttnMask.from_slices([[0, 1]], [[0, 0]], "full", 5000, 5000),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
@pytest.mark.parametrize("name", MASKS)
def test_rows_are_those_of_the_table(name: str, num_ranks: int) -> None:
    plan = build_plan(MASKS[name], num_ranks)
    received, sent = rows_moved(plan.mask.bands, plan.q_layout, plan.k_layout)
    np.testing.assert_array_equal(received, plan.received_rows)
    np.testing.assert_array_equal(sent, plan.sent_rows)


@pytest.mark.parametrize("name", MASKS)
def test_one_stage_is_predicted_without_a_plan(name: str) -> None:
    plan, cost = build_plan(MASKS[name], 4), cost_of(OverlapConfig(), Heads())
    assert prediction_of_one_stage(plan.mask, plan.q_layout, plan.k_layout, cost) == prediction(plan, Heads(), cost)


def test_keys_that_lie_elsewhere() -> None:
    mask = AttnMask.from_slices([[0, 400], [400, 900]], [[0, 50], [40, 130]], ["full", "causal"], 900, 130)
    plan = build_plan(mask, 3, is_same_source=False)
    received, sent = rows_moved(mask.bands, plan.q_layout, plan.k_layout)
    np.testing.assert_array_equal(received, plan.received_rows)
    np.testing.assert_array_equal(sent, plan.sent_rows)
