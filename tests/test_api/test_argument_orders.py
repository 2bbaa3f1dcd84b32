"""Both released orders of the arguments of keys: by position, by keyword, mixed, and with None in any place that takes it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.api import (
    DistAttnConfig,
    DistAttnRuntimeKey,
    OverlapConfig,
    dispatch,
    magi_attn_flex_dispatch,
    magi_attn_flex_key,
    magi_attn_key,
    magi_attn_varlen_dispatch,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
)
from magi_attention.api.argument_orders import in_both_orders
from magi_attention.mask import causal
from magi_attention.testing.dist import shared_pool

LEADING = {
    "varlen": "cu_seqlens_q cu_seqlens_k num_heads_q num_heads_kv head_dim",
    "flex": "q_ranges k_ranges attn_mask_type total_seqlen_q total_seqlen_k num_heads_q num_heads_kv head_dim",
}
ORDERS = {
    "varlen v1.1.0": "pad_size chunk_size cp_group_or_mesh causal window_size dist_attn_config",
    "varlen v1.1.1": "pad_size cp_group_or_mesh causal window_size dist_attn_config chunk_size",
    "flex v1.1.0": "pad_size chunk_size cp_group_or_mesh dist_attn_config is_same_source is_q_permutable is_k_permutable",
    "flex v1.1.1": "pad_size cp_group_or_mesh dist_attn_config is_same_source is_q_permutable is_k_permutable chunk_size",
}
KEY_FUNCTIONS: dict[str, Callable[..., DistAttnRuntimeKey]] = {
    "varlen": magi_attn_varlen_key,
    "flex": magi_attn_flex_key,
}

CONFIG = DistAttnConfig(overlap_config=OverlapConfig(degree=2))
GROUP = dist.ProcessGroup(0, 1)
MESH = DeviceMesh.__new__(DeviceMesh)
VALUES: dict[str, list[Any]] = {
    "pad_size": [0, None],
    "chunk_size": [512, None],
    "cp_group_or_mesh": [GROUP, MESH, None],
    "causal": [True],
    "window_size": [(4, 0)],
    "dist_attn_config": [CONFIG],
    "is_same_source": [False],
    "is_q_permutable": [True],
    "is_k_permutable": [False],
}


def probe(kind: str) -> Callable[..., dict[str, Any]]:
    """Takes what the key function takes, and returns what each parameter got."""
    signature = inspect.signature(KEY_FUNCTIONS[kind])

    def record(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    record.__signature__ = signature  # type: ignore[attr-defined]
    return in_both_orders(record)


def cases() -> Iterator[Any]:
    for order, names in ORDERS.items():
        for nones in itertools.product((False, True), repeat=3):
            maybe_none = dict(zip(("pad_size", "chunk_size", "cp_group_or_mesh"), nones, strict=True))
            without = ", ".join(name for name, is_none in maybe_none.items() if is_none) or "nothing"
            yield pytest.param(order, names.split(), maybe_none, id=f"{order}, None for {without}")


@pytest.mark.parametrize(("order", "names", "maybe_none"), list(cases()))
def test_every_split_into_positions_and_keywords(order: str, names: list[str], maybe_none: dict[str, bool]) -> None:
    kind = order.split()[0]
    leading = dict.fromkeys(LEADING[kind].split(), 1)
    call = probe(kind)
    values = {name: None if maybe_none.get(name) else VALUES[name][0] for name in names}
    for mesh_or_group in [None] if maybe_none["cp_group_or_mesh"] else [GROUP, MESH]:
        values["cp_group_or_mesh"] = mesh_or_group
        expected = call(**leading, **values)
        assert all(expected[name] is value for name, value in values.items())
        for num_positional in range(len(names) + 1):
            rest = [values[name] for name in names[:num_positional]]
            keywords = {name: values[name] for name in names[num_positional:]}
            assert call(*leading.values(), *rest, **keywords) == expected, num_positional
            # Without the keywords the parameters keep their defaults.
            default = call(**leading, **dict(zip(names, rest, strict=False)))
            assert call(*leading.values(), *rest) == default, num_positional


@pytest.mark.parametrize("kind", LEADING)
@pytest.mark.parametrize("group", [GROUP, MESH, None])
@pytest.mark.parametrize("pad_size", [0, None])
def test_a_group_by_position_and_chunks_by_keyword(kind: str, group: Any, pad_size: int | None) -> None:
    leading = [1] * len(LEADING[kind].split())
    got = probe(kind)(*leading, pad_size, group, chunk_size=512)
    assert (got["pad_size"], got["cp_group_or_mesh"], got["chunk_size"]) == (pad_size, group, 512)
    got = probe(kind)(*leading, pad_size, 512, cp_group_or_mesh=group)
    assert (got["pad_size"], got["cp_group_or_mesh"], got["chunk_size"]) == (pad_size, group, 512)


def test_ints_of_any_kind_are_chunk_sizes() -> None:
    for size in (torch.tensor(512), np.int64(512)):
        assert probe("varlen")(1, 1, 1, 1, 1, None, size, GROUP)["chunk_size"] is size


def test_bools_of_numpy_are_flags() -> None:
    got = probe("varlen")(1, 1, 1, 1, 1, None, None, np.True_)
    assert (got["cp_group_or_mesh"], got["causal"]) == (None, True)


@pytest.mark.parametrize("wrong", ["512", 512.0, (512,), True])
def test_what_is_neither_chunks_nor_group(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match="after pad_size comes chunk_size, an int, or cp_group_or_mesh, a ProcessGroup"
    ):
        magi_attn_varlen_key([0, 32], [0, 32], 4, 2, 8, 0, wrong)


def test_what_python_refuses() -> None:
    with pytest.raises(TypeError, match=r"multiple values for .*argument 'pad_size'"):
        magi_attn_varlen_key([0, 32], [0, 32], 4, 2, 8, 0, pad_size=0)
    with pytest.raises(TypeError, match="positional arguments"):
        magi_attn_varlen_key([0, 32], [0, 32], 4, 2, 8, *[None] * 7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunks'"):
        magi_attn_varlen_key([0, 32], [0, 32], 4, 2, 8, chunks=4)
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        magi_attn_varlen_key([0, 32])


X = torch.zeros(32, 3)
CU = torch.tensor([0, 20, 32])
RANGES = [[0, 32]]
V1_0_CALLS: dict[str, Callable[[], object]] = {
    "varlen, 1.0.0": lambda: magi_attn_varlen_key(X, CU, CU, 8, 0, GROUP),
    "varlen, 1.0.5": lambda: magi_attn_varlen_key(CU, CU, 0, 512, GROUP, True),
    "varlen, 1.0.5, no group": lambda: magi_attn_varlen_key(CU, CU, 0, 512, None),
    "varlen, 1.0.5, short": lambda: magi_attn_varlen_key(CU, CU, 0, 512),
    "varlen, 1.0.5, keywords": lambda: magi_attn_varlen_key(CU, CU, pad_size=0, chunk_size=512, cp_group_or_mesh=MESH),
    "flex, 1.0.5": lambda: magi_attn_flex_key(RANGES, RANGES, "full", 32, 32, 0, 512, MESH, DistAttnConfig()),
    "flex, 1.0.5, keywords": lambda: magi_attn_flex_key(RANGES, RANGES, "full", 32, 32, pad_size=0, chunk_size=512),
    "one of three": lambda: magi_attn_varlen_key(CU, CU, 4, 2),
}


@pytest.mark.parametrize("call", V1_0_CALLS)
def test_calls_without_heads(call: str) -> None:
    with pytest.raises(
        ValueError, match=r"takes num_heads_q, num_heads_kv and head_dim after .* have none of the three: add them"
    ):
        V1_0_CALLS[call]()


@pytest.mark.filterwarnings("ignore:magi_attn_varlen_dispatch is deprecated")
def test_dispatches_without_heads() -> None:
    with pytest.raises(ValueError, match="add them"):
        magi_attn_varlen_dispatch(X, CU, CU, 0, 512, GROUP)


@pytest.mark.parametrize("make", [magi_attn_flex_key, magi_attn_varlen_key])
@pytest.mark.parametrize("rest", [(), (4, 2, 8), (4, 2, 8, 0, 512)])
def test_a_mask_as_a_value(make: Callable[..., Any], rest: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got an AttnMask; call magi_attn_key\(mask, num_heads_q"):
        make(causal(32), *rest)
    with pytest.raises(ValueError, match="got an AttnMask; call magi_attn_key"):
        make(mask=causal(32), num_heads_q=4, num_heads_kv=2, head_dim=8)


def test_key_of_a_mask() -> None:
    key = magi_attn_key(causal(32), 4, 2, 8, chunk_size=4)
    assert key == magi_attn_flex_key(RANGES, RANGES, "causal", 32, 32, 4, 2, 8, chunk_size=4)
    with pytest.raises(ValueError, match="mask must be an AttnMask, got a list; call magi_attn_flex_key"):
        magi_attn_key(RANGES, 4, 2, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is_same_source"):
        magi_attn_key(causal(32, 40), 4, 2, 8)


def test_heads_or_config_after_the_key() -> None:
    first = magi_attn_flex_key(RANGES, RANGES, "causal", 32, 32, 4, 2, 8, chunk_size=4)

    def second(*args: Any, **kwargs: Any) -> tuple[int, int, int, DistAttnConfig]:
        key = make_flex_key_for_new_mask_after_dispatch(RANGES, RANGES, "full", first, *args, **kwargs)
        return key.num_heads_q, key.num_heads_kv, key.head_dim, key.config

    kept, config = first.config, CONFIG
    assert second() == second(None) == second(None, None, None) == second(None, None, None, None) == (4, 2, 8, kept)
    assert second(config) == second(dist_attn_config=config) == second(None, None, None, config) == (4, 2, 8, config)
    assert second(None, dist_attn_config=config) == (4, 2, 8, config)
    assert second(6, 3, 16) == second(6, 3, head_dim=16) == second(num_heads_q=6, num_heads_kv=3, head_dim=16)
    assert second(6, 3, 16, config) == second(6, 3, 16, dist_attn_config=config) == (6, 3, 16, config)
    assert second(8) == (8, 2, 8, kept)
    with pytest.raises(TypeError):
        second(config, config, config, config, config)


def test_signatures_for_help() -> None:
    varlen = [*LEADING["varlen"].split(), *ORDERS["varlen v1.1.0"].split()]
    assert list(inspect.signature(magi_attn_varlen_key).parameters) == varlen
    assert list(inspect.signature(magi_attn_varlen_dispatch).parameters) == ["x", *varlen]
    flex = [*LEADING["flex"].split(), *ORDERS["flex v1.1.0"].split(), "layout_key"]
    assert list(inspect.signature(magi_attn_flex_key).parameters) == flex
    assert list(inspect.signature(magi_attn_flex_dispatch).parameters) == ["x", *flex]


def check_real_keys() -> None:
    group, x = dist.group.WORLD, torch.arange(32.0)
    expected = magi_attn_varlen_key(CU, CU, 4, 2, 8, chunk_size=4, cp_group_or_mesh=group, causal=True)
    assert magi_attn_varlen_key(CU, CU, 4, 2, 8, 0, 4, group, True) is expected
    assert magi_attn_varlen_key(CU, CU, 4, 2, 8, 0, group, True, chunk_size=4) is expected
    assert magi_attn_varlen_key(CU, CU, 4, 2, 8, 0, group, True, (-1, -1), DistAttnConfig(), 4) is expected
    expected = magi_attn_flex_key(RANGES, RANGES, "causal", 32, 32, 4, 2, 8, chunk_size=4, cp_group_or_mesh=group)
    for rest in ((0, 4, group), (None, 4, None, DistAttnConfig()), (0, group, DistAttnConfig(), True, True, True, 4)):
        assert magi_attn_flex_key(RANGES, RANGES, "causal", 32, 32, 4, 2, 8, *rest) is expected
        with pytest.warns(DeprecationWarning, match="then dispatch"):
            local, key = magi_attn_flex_dispatch(x, RANGES, RANGES, "causal", 32, 32, 4, 2, 8, *rest)
        assert key is expected
        assert torch.equal(local, dispatch(x, expected))
    for order in ((0, group, True), (0, None, group, True)):
        with pytest.warns(DeprecationWarning, match="then dispatch"):
            assert magi_attn_varlen_dispatch(x, CU, CU, 4, 2, 8, *order)[1].cp_size == 2


def test_keys_over_ranks() -> None:
    shared_pool().run(check_real_keys, num_ranks=2)
