"""What dispatch modes see of eager calls: policies of selective checkpointing, FLOP counters, any mode of a user's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from magi_attention.api import (
    DistAttnRuntimeKey,
    calc_attn,
    dispatch,
    flex_flash_attn_func,
    magi_attn_varlen_key,
    plan_of,
    roll,
    undispatch,
)
from magi_attention.comm import pending
from magi_attention.testing.dist import shared_pool

NUM_TOKENS, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 29, 4, 2, 8, 64
CUT = 11
OPS = torch.ops.magi_attention
AREA = CUT * (CUT + 1) // 2 + (NUM_TOKENS - CUT) * (NUM_TOKENS - CUT + 1) // 2


def make_key() -> DistAttnRuntimeKey:
    edges = [0, CUT, NUM_TOKENS]
    return magi_attn_varlen_key(edges, edges, HEADS, KV_HEADS, HEAD_DIM, causal=True, chunk_size=2)


def block(x: Tensor, weight: Tensor, key: DistAttnRuntimeKey) -> Tensor:
    """All that a model does with a key, in one block."""
    local = roll(dispatch(x @ weight, key), -1, 0, key)
    q, k, v = local.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    out, _ = calc_attn(q, k, v, key)
    return undispatch(out.flatten(1).cos(), key)


def make_leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (NUM_TOKENS, 16), (16, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def differentiate(run: Callable[..., Tensor], key: DistAttnRuntimeKey) -> list[Tensor]:
    x, weight = make_leaves()
    out = run(x, weight, key)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))]


class CountCollectives:
    """How many collectives this rank starts."""

    def __enter__(self) -> Counter[str]:
        self.counts: Counter[str] = Counter()
        self._start = pending.start

        def start(collective: Any, buffers: Any, group: Any, label: str, *others: Any) -> Any:
            self.counts[label] += 1
            return self._start(collective, buffers, group, label, *others)

        for module in _users_of_start():
            module.start = start  # type: ignore[attr-defined]
        return self.counts

    def __exit__(self, *_: object) -> None:
        for module in _users_of_start():
            module.start = self._start  # type: ignore[attr-defined]


def _users_of_start() -> list[Any]:
    from magi_attention.comm import transport

    return [pending, transport]


def keep_by_policy() -> None:
    key = make_key()
    ours = [OPS.dispatch.default, OPS.undispatch.default, OPS.roll.default, OPS.distributed_attn.default]
    with CountCollectives() as plain:
        expected = differentiate(block, key)
    assert plain["k/v, forward, stage 0 of 1"] == 1, plain

    def policy(kept: list[Any], _: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    for kept, repeats in ((ours, False), ([], True)):
        contexts = partial(create_selective_checkpoint_contexts, partial(policy, kept))
        run = partial(checkpoint, block, use_reentrant=False, context_fn=contexts)
        with CountCollectives() as counts:
            actual = differentiate(run, key)
        for x, y in zip(expected, actual, strict=True):
            assert torch.equal(x, y)
        assert (counts != plain) is repeats, f"{counts} for {plain}"
        forward = [label for label in counts if "forward" in label]
        assert all(counts[label] == (2 if repeats else 1) for label in forward), counts


def test_policies_keep_attention_and_what_it_communicates() -> None:
    shared_pool().run(keep_by_policy, num_ranks=2)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "magi_attention":
            self.names[operator._opname] += 1
        return operator(*args, **(kwargs or {}))


def look_on() -> None:
    key, expected = make_key(), []
    for _ in range(2):
        with Seen() as mode:
            results = differentiate(block, key)
        names = ("distributed_attn", "distributed_attn_backward")
        assert mode.names == {**dict.fromkeys(names, 1), "dispatch": 2, "undispatch": 2, "roll": 2}, mode.names
        expected = differentiate(block, key)
        for x, y in zip(expected, results, strict=True):
            assert torch.equal(x, y)
        assert not torch._C._len_torch_dispatch_stack()
    x, weight = make_leaves()
    loss = block(x, weight, key).square().sum()
    with Seen() as mode:  # the backward alone
        grads = torch.autograd.grad(loss, (x, weight))
    assert mode.names == dict.fromkeys(("distributed_attn_backward", "dispatch", "undispatch", "roll"), 1), mode.names
    assert all(torch.equal(*pair) for pair in zip(expected[1:], grads, strict=True))
    with Seen() as mode, torch.utils._python_dispatch._disable_current_modes():
        differentiate(block, key)
    assert not mode.names


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_mode_sees_each_call_and_its_backward(num_ranks: int) -> None:
    shared_pool().run(look_on, num_ranks=num_ranks)


def count_flops() -> None:
    key = make_key()
    mine = int(plan_of(key).areas[dist.get_rank()])
    x, weight = make_leaves()
    with FlopCounterMode(display=False) as counter:
        block(x, weight, key).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.distributed_attn] == 4 * mine * HEADS * HEAD_DIM
    assert counts[OPS.distributed_attn_backward] == 10 * mine * HEADS * HEAD_DIM
    total = torch.tensor(counts[OPS.distributed_attn])
    dist.all_reduce(total)
    assert total == 4 * AREA * HEADS * HEAD_DIM


def test_flops_of_each_rank() -> None:
    shared_pool().run(count_flops, num_ranks=2)


@pytest.mark.parametrize("v_dim", [HEAD_DIM, 24])
def test_flops_of_one_device(v_dim: int) -> None:
    q, k = (torch.randn(NUM_TOKENS, heads, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS))
    v = torch.randn(NUM_TOKENS, KV_HEADS, v_dim, requires_grad=True)
    ranges = torch.tensor([[0, CUT], [CUT, NUM_TOKENS]], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        flex_flash_attn_func(q, k, v, ranges, ranges, torch.ones(2, dtype=torch.int32))[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.flex_flash_attn] == 2 * AREA * HEADS * (HEAD_DIM + v_dim)
    assert counts[OPS.flex_flash_attn_backward] == 2 * AREA * HEADS * (3 * HEAD_DIM + 2 * v_dim)


def test_flops_of_tables_that_cannot_be_read() -> None:
    """Fake tables say nothing of the mask, so all cells count, as torch counts those of its own attention."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.randn(NUM_TOKENS, HEADS, HEAD_DIM)
        ranges = torch.zeros(2, 2, dtype=torch.int32)
        flex_flash_attn_func(q, q, q, ranges, ranges)
    assert counter.get_total_flops() == 4 * NUM_TOKENS**2 * HEADS * HEAD_DIM
