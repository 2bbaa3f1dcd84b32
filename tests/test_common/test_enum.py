"""Names and numbers of the public choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magi_attention.common import AttnForwardMeta, enum
from magi_attention.common.enum import (
    AttnMaskType,
    AttnOverlapMode,
    AttnRole,
    AttnType,
    DispatchAlgType,
    OverlapAlgType,
    to_mask_types,
)

FULL, CAUSAL, INVCAUSAL, BICAUSAL = (
    AttnMaskType.FULL,
    AttnMaskType.CAUSAL,
    AttnMaskType.INVCAUSAL,
    AttnMaskType.BICAUSAL,
)


@pytest.mark.parametrize(
    ("name", "number", "member"),
    [("full", 0, FULL), ("causal", 1, CAUSAL), ("inv_causal", 2, INVCAUSAL), ("bi_causal", 3, BICAUSAL)],
)
def test_mask_types(name: str, number: int, member: AttnMaskType) -> None:
    assert AttnMaskType(name) is member
    assert AttnMaskType(member) is member
    assert AttnMaskType.from_int_type(number) is member
    assert member.to_int_type() == number
    assert member.value == name


@pytest.mark.parametrize("wrong", ["casual", "CAUSAL", "", None, 1.5])
def test_misspelt_mask_type_is_told_the_four(wrong: object) -> None:
    for make in (AttnMaskType, lambda one: to_mask_types(one, 2), lambda one: to_mask_types(["full", one], 2)):
        with pytest.raises(ValueError, match='one of "full", "causal", "inv_causal", "bi_causal"') as caught:
            make(wrong)  # type: ignore[arg-type]
        assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", [4, -1])
def test_mask_type_of_another_int(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"0 .full., 1 .causal., 2 .inv_causal. or 3 .bi_causal., got {wrong}"):
        AttnMaskType.from_int_type(wrong)


def test_to_mask_types() -> None:
    assert to_mask_types("causal", 3) == [CAUSAL] * 3
    assert to_mask_types(BICAUSAL, 2) == [BICAUSAL] * 2
    assert to_mask_types(2, 1) == [INVCAUSAL]
    assert to_mask_types(["full", CAUSAL, 3, np.int64(2)], 4) == [FULL, CAUSAL, BICAUSAL, INVCAUSAL]
    assert to_mask_types(np.array([0, 1]), 2) == [FULL, CAUSAL]
    assert to_mask_types(torch.tensor([0, 1], dtype=torch.int32), 2) == [FULL, CAUSAL]
    assert to_mask_types(iter(["full"]), 1) == [FULL]
    assert to_mask_types([], 0) == []
    with pytest.raises(ValueError, match="one for each of the 3, got 2 types"):
        to_mask_types(["full", "full"], 3)


def test_other_names() -> None:
    assert (AttnOverlapMode.STATIC.value, AttnOverlapMode.DYNAMIC.value) == ("static", "dynamic")
    assert [role.value for role in AttnRole] == ["query", "key", "value"]
    assert [kind.value for kind in AttnType] == ["self_attn", "cross_attn"]
    assert DispatchAlgType("min_heap") is DispatchAlgType.MIN_HEAP
    assert OverlapAlgType("uniform") is OverlapAlgType.UNIFORM
    assert enum.AttnMaskType is AttnMaskType


def test_forward_meta() -> None:
    lse = torch.zeros(3, 2)
    meta = AttnForwardMeta(lse=lse, max_logits=None)
    assert meta.lse is lse
    assert meta.max_logits is None
    assert AttnForwardMeta(lse, lse[0]).max_logits is not None
