"""What programs put around calls: threads with groups of their own, checkpoints, offloading, a sharded model compiled whole.

Each beside the same call without it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magi_attention.api import DistAttnRuntimeKey, calc_attn, dispatch, magi_attn_varlen_key, roll, undispatch
from magi_attention.testing.dist import shared_pool

NUM_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 29, 4, 2, 8
Leaves = tuple[Tensor, Tensor]


def make_key(cut: int = 11, group: dist.ProcessGroup | None = None) -> DistAttnRuntimeKey:
    edges = [0, cut, NUM_TOKENS]
    return magi_attn_varlen_key(
        edges, edges, HEADS, KV_HEADS, HEAD_DIM, causal=True, chunk_size=2, cp_group_or_mesh=group or dist.group.WORLD
    )


def make_leaves(seed: int = 0) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    x, sink = torch.randn(NUM_TOKENS, 64, generator=generator), torch.randn(2, HEADS, generator=generator)
    return x.requires_grad_(), sink.requires_grad_()


def block(x: Tensor, sink: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    local = roll(dispatch(x, key), 1, 0, key)
    q, k, v = local.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    out, _ = calc_attn(q, k, v, key, sink=sink)
    return undispatch(out.flatten(1).cos(), key)


def differentiate(run: Callable[..., Tensor], key: DistAttnRuntimeKey, seed: int = 0) -> list[Tensor]:
    leaves = make_leaves(seed)
    out = run(*leaves, key)
    (out * out.detach().sin()).sum().backward()  # what reentrant checkpoints ask for, rather than torch.autograd.grad
    assert all(leaf.grad is not None for leaf in leaves)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(expected: list[Tensor], actual: list[Tensor]) -> None:
    for x, y in zip(expected, actual, strict=True):
        assert torch.equal(x, y)


def recompute() -> None:
    key = make_key()
    expected = differentiate(block, key)
    for use_reentrant in (True, False):
        assert_same(expected, differentiate(partial(checkpoint, block, use_reentrant=use_reentrant), key))
    nested = partial(checkpoint, partial(checkpoint, block, use_reentrant=False), use_reentrant=False)
    assert_same(expected, differentiate(nested, key))


def offload() -> None:
    """What is saved goes through hooks: each tensor is packed once and unpacked once."""
    key = make_key()
    expected = differentiate(block, key)
    with torch.autograd.graph.save_on_cpu():
        assert_same(expected, differentiate(block, key))
    packed: list[int] = []
    unpacked: list[int] = []

    def pack(x: Tensor) -> tuple[int, Tensor]:
        packed.append(len(packed))
        return packed[-1], x.clone()

    def unpack(saved: tuple[int, Tensor]) -> Tensor:
        unpacked.append(saved[0])
        return saved[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_same(expected, differentiate(block, key))
    assert sorted(unpacked) == packed


def work_in_threads() -> None:
    """Each thread has a group and keys of its own; the same number of ranks is in each."""
    groups = [dist.new_group() for _ in range(3)]
    expected = [differentiate(block, make_key(5 + at), seed=at) for at in range(3)]
    failures: list[BaseException] = []

    def work(at: int) -> None:
        try:
            for repeat in range(6):
                cut = 5 + at if repeat % 2 else 5 + at + repeat  # the one of `expected`, and new plans
                results = differentiate(block, make_key(cut, groups[at]), seed=at)
                if cut == 5 + at:
                    assert_same(expected[at], results)
        except BaseException as error:
            failures.append(error)
            raise

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures, failures


class Block(nn.Module):
    def __init__(self, with_ours: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 64), nn.Linear(32, 32)
        self.with_ours = with_ours

    def forward(self, x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        if self.with_ours:
            out, _ = calc_attn(q, k, v, key)
        else:
            heads = (one.transpose(0, 1)[None] for one in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        return x + self.out(out.flatten(1))


class Model(nn.Module):
    def __init__(self, with_ours: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(with_ours) for _ in range(2))

    def forward(self, x: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        for one in self.blocks:
            x = one(x, key)
        return x


def compile_sharded_models() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    key, mesh = make_key(), init_device_mesh("cpu", (dist.get_world_size(),))
    x = dispatch(torch.randn(NUM_TOKENS, 32, generator=torch.Generator().manual_seed(0)), key)

    def run(model: Any) -> list[Tensor]:
        model.zero_grad()
        out = model(x, key)
        out.square().sum().backward()
        gradient = next(model.parameters()).grad
        return [out.detach(), gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient]

    def make(with_ours: bool, each: Callable[[nn.Module], None] = lambda _: None) -> nn.Module:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Model(with_ours)
        for one in model.blocks:
            each(one)
            fully_shard(one, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for with_ours in (True, False):
        expected = run(make(with_ours))
        for actual in (
            run(make(with_ours, lambda one: one.compile(backend="aot_eager", fullgraph=True))),
            run(torch.compile(make(with_ours), backend="aot_eager")),
        ):
            for one, other in zip(expected, actual, strict=True):
                torch.testing.assert_close(other, one)
        # FSDP enters a block by a hook that dynamo must not trace, whatever the block computes.
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            run(torch.compile(make(with_ours), backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("check", [recompute, offload, work_in_threads], ids=lambda check: check.__name__)
def test_around_calls(check: Callable[[], None]) -> None:
    shared_pool().run(check, num_ranks=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
def test_sharded_models_compile_as_with_torchs_attention() -> None:
    shared_pool().run(compile_sharded_models, num_ranks=2)
