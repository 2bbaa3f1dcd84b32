"""A pickled key is plain data: unbound where it is loaded, refused until it is bound. A copied key is the key itself."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset

from magi_attention.api import (
    DistAttnRuntimeKey,
    calc_attn,
    clear_cache,
    dispatch,
    get_position_ids,
    magi_attn_flex_key,
    magi_attn_joint_keys,
    magi_attn_varlen_key,
    make_flex_key_for_new_mask_after_dispatch,
    plan_of,
    roll,
    undispatch,
)
from magi_attention.mask import causal, full
from magi_attention.testing.dist import shared_pool
from magi_attention.testing.oracle import attention_oracle

TOTAL, HEADS, KV_HEADS, HEAD_DIM = 24, 2, 1, 8


def make_key(kind: str = "causal", **options: Any) -> DistAttnRuntimeKey:
    edges = [[0, TOTAL]]
    return magi_attn_flex_key(edges, edges, kind, TOTAL, TOTAL, HEADS, KV_HEADS, HEAD_DIM, chunk_size=3, **options)


def make_cross_key() -> DistAttnRuntimeKey:
    """Whose queries lie as those of another key."""
    return make_key("full", is_same_source=False, is_q_permutable=False, layout_key=make_key())


def make_second_key() -> DistAttnRuntimeKey:
    return make_flex_key_for_new_mask_after_dispatch([[0, TOTAL]], [[0, TOTAL]], "full", make_key())


def make_joint_key() -> DistAttnRuntimeKey:
    """The second of two, which keeps the dispatch of the first."""
    masks = [causal(TOTAL), full(TOTAL)]
    return magi_attn_joint_keys(masks, [1, 2], HEADS, KV_HEADS, HEAD_DIM, chunk_size=3)[1]


KINDS: dict[str, Callable[[], DistAttnRuntimeKey]] = {
    "plain": make_key,
    "cross-attention": make_cross_key,
    "second mask": make_second_key,
    "joint": make_joint_key,
}


def loaded(key: DistAttnRuntimeKey) -> DistAttnRuntimeKey:
    result: DistAttnRuntimeKey = pickle.loads(pickle.dumps(key))
    return result


def random_qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOTAL, heads, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def attend(q: Tensor, k: Tensor, v: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    return calc_attn(q, k, v, key)[0]


USES: dict[str, Callable[[DistAttnRuntimeKey], object]] = {
    "dispatch": lambda key: dispatch(torch.zeros(TOTAL, 1), key),
    "undispatch": lambda key: undispatch(torch.zeros(TOTAL, 1), key),
    "roll": lambda key: roll(torch.zeros(TOTAL, 1), 1, 0, key),
    "get_position_ids": get_position_ids,
    "calc_attn": lambda key: attend(*random_qkv(), key),
    "plan_of": plan_of,
    "a second mask": lambda key: make_flex_key_for_new_mask_after_dispatch([[0, 1]], [[0, 1]], "full", key),
    "layout_key": lambda key: make_key("full", is_same_source=False, is_q_permutable=False, layout_key=key),
    "cp_size": lambda key: key.cp_size,
    "cp_rank": lambda key: key.cp_rank,
}


@pytest.mark.parametrize("use", USES)
def test_an_unbound_key_is_refused(use: str) -> None:
    with pytest.raises(ValueError, match=r"call key\.bind\(group\)"):
        USES[use](loaded(make_key()))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
def test_an_unbound_key_is_refused_compiled() -> None:
    compiled, key = torch.compile(attend, backend="aot_eager"), make_key()
    expected = compiled(*random_qkv(), key)
    with pytest.raises(ValueError, match=r"call key\.bind\(group\)"):
        compiled(*random_qkv(), loaded(key))
    torch.testing.assert_close(compiled(*random_qkv(), loaded(key).bind()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_key_is_a_value(kind: str) -> None:
    key = KINDS[kind]()
    first, second = loaded(key), loaded(key)
    assert first == second
    assert hash(first) == hash(second)
    assert first != key
    assert not first.is_bound
    assert first.cp_group is None and first.cp_mesh is None and first.handle < 0
    assert (first.pad_size, first.chunk_size) == (key.pad_size, key.chunk_size)
    assert first.q_ranges == key.q_ranges
    assert not first.mask.bands.flags.writeable
    assert first in {second}
    assert loaded(first) == first


@pytest.mark.parametrize("kind", KINDS)
def test_binding_finds_the_cached_plan_or_makes_it(kind: str) -> None:
    key = KINDS[kind]()
    unbound = loaded(key)
    assert unbound.bind() is key
    assert key.bind() is key
    assert not unbound.is_bound
    digest = plan_of(key).digest()
    clear_cache()
    again = unbound.bind()
    assert again == key
    assert again.handle != key.handle
    assert plan_of(again).digest() == digest


def test_binding_on_ranks() -> None:
    shared_pool().run(check_on_ranks, num_ranks=2)


def check_on_ranks() -> None:
    for make in KINDS.values():
        key = make()
        unbound = loaded(key)
        assert unbound.bind(dist.group.WORLD) is key
        assert copy.deepcopy(key) is key and copy.copy(key) is key
        x = torch.arange(TOTAL * 2.0).view(TOTAL, 2)
        assert torch.equal(undispatch(dispatch(x, unbound.bind()), key), x)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    moved = unbound.bind(alone)
    assert (moved.cp_size, moved.cp_group) == (1, alone)
    assert plan_of(moved).num_ranks == 1


def check_nodes_on_other_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inter", "intra"))
    os.environ["MAGI_ATTENTION_HIERARCHICAL_COMM"] = "1"
    edges = [0, 10, TOTAL]
    key = magi_attn_varlen_key(edges, edges, 4, 2, 16, causal=True, cp_group_or_mesh=mesh)
    assert loaded(key).bind(mesh) is key
    for ranks in (mesh["intra"], mesh["intra"].get_group()):
        assert loaded(key).bind(ranks).cp_size == 2


def test_a_key_of_nodes_is_bound_to_a_mesh_as_to_its_group() -> None:
    shared_pool().run(check_nodes_on_other_ranks, num_ranks=4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = make_key()
        self.weight = nn.Parameter(torch.ones(3))


def check_modules() -> None:
    layer = Layer()
    assert copy.deepcopy(layer).key is layer.key
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    assert averaged.module.key is layer.key
    file = io.BytesIO()
    torch.save({"key": layer.key, "layer": layer}, file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    assert state["key"].bind() is layer.key
    assert state["layer"].key == state["key"]


def check_distributed_checkpoint(folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    key = make_key()
    dcp.save({"weight": torch.ones(3), "key": key}, checkpoint_id=folder)
    state: dict[str, Any] = {"weight": torch.zeros(3), "key": None}
    dcp.load(state, checkpoint_id=folder)
    assert torch.equal(state["weight"], torch.ones(3))
    assert state["key"].bind() is key


def test_modules_that_hold_a_key() -> None:
    shared_pool().run(check_modules, num_ranks=2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_distributed_checkpoint(tmp_path: Path) -> None:
    shared_pool().run(check_distributed_checkpoint, str(tmp_path), num_ranks=2)


class Batches(Dataset[DistAttnRuntimeKey]):
    """Keys of packed batches, made where the loader's worker runs."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: int) -> DistAttnRuntimeKey:
        edges = [0, 10 + at, TOTAL]
        return magi_attn_varlen_key(edges, edges, HEADS, KV_HEADS, HEAD_DIM, chunk_size=3)


def test_keys_made_by_a_spawned_loader() -> None:
    """Their handles would be numbers of other keys of this process."""
    mine = [make_key("causal") for _ in range(3)]
    loader = DataLoader(Batches(), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    q, k, v = random_qkv()
    for at, unbound in enumerate(loader):
        with pytest.raises(ValueError, match=r"call key\.bind\(group\)"):
            attend(q, k, v, unbound)
        key = unbound.bind()
        attended = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
        attended[: 10 + at, : 10 + at] = attended[10 + at :, 10 + at :] = True
        truth = attention_oracle(q.double(), k.double(), v.double(), attended)
        out = undispatch(attend(*(dispatch(x, key) for x in (q, k, v)), key), key)
        torch.testing.assert_close(out.double(), truth.out, rtol=1e-5, atol=1e-6)
    del mine
