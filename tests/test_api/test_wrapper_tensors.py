"""Tensors without memory of their own: waited for, computed on what each rank holds, or refused; never read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from magi_attention.api import (
    AttnForwardMeta,
    DistAttnRuntimeKey,
    calc_attn,
    dispatch,
    flex_flash_attn_func,
    magi_attn_varlen_key,
    roll,
    undispatch,
)
from magi_attention.testing.dist import shared_pool

NUM_TOKENS, HEADS, KV_HEADS, HEAD_DIM = 29, 8, 4, 16
CUT = 11


def tables() -> tuple[Tensor, Tensor, Tensor]:
    ranges = torch.tensor([[0, CUT], [CUT, NUM_TOKENS]], dtype=torch.int32)
    return ranges, ranges, torch.ones(2, dtype=torch.int32)


def make_key(group: Any = None, share: int = 1) -> DistAttnRuntimeKey:
    """Of a head count divided by ``share``."""
    edges, heads = [0, CUT, NUM_TOKENS], (HEADS // share, KV_HEADS // share)
    return magi_attn_varlen_key(
        edges, edges, *heads, HEAD_DIM, causal=True, chunk_size=2, cp_group_or_mesh=group or dist.group.WORLD
    )


def leaves() -> list[Tensor]:
    """q, k, v, and a sink."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*((NUM_TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)), (2, HEADS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def weights(like: Tensor) -> Tensor:
    return torch.arange(like.numel()).view(like.shape).sin()


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Any]:
    return flex_flash_attn_func(q, k, v, *tables(), sink=sink, return_max_logits=True)


def attend_without_loss_of_lse(*tensors: Tensor) -> tuple[Tensor, Any]:
    """AOTAutograd asks for the gradients of all DTensors that a graph returns, unless they are detached."""
    out, meta = attend(*tensors)
    assert meta.lse is not None and meta.max_logits is not None
    return out, AttnForwardMeta(meta.lse.detach(), meta.max_logits.detach())


def wait_for_collectives() -> None:
    import torch.distributed._functional_collectives as functional

    group, q, k, v = dist.group.WORLD, *leaves()[:3]
    rank, size = dist.get_rank(), dist.get_world_size()
    expected = flex_flash_attn_func(q, k, v, *tables())[0]
    shares = [torch.cat([x, x.new_zeros(-len(x) % size, *x.shape[1:])]).chunk(size)[rank].detach() for x in (q, k, v)]
    gathered = [functional.all_gather_tensor(x, 0, group)[:NUM_TOKENS] for x in shares]
    assert all(type(x) is not Tensor for x in gathered), "the collectives no longer give asynchronous tensors"
    assert torch.equal(flex_flash_attn_func(*gathered, *tables())[0], expected)

    key = make_key()
    local = [dispatch(x.detach(), key) for x in (q, k, v)]
    expected, _ = calc_attn(*local, key)

    def there_and_back(x: Tensor) -> Tensor:
        """An asynchronous tensor that holds ``x``."""
        splits = [len(x) if to == rank else 0 for to in range(size)]
        return functional.all_to_all_single(x, splits, splits, group)

    assert torch.equal(calc_attn(*map(there_and_back, local), key)[0], expected)
    assert torch.equal(dispatch(there_and_back(q.detach()), key), local[0])
    assert torch.equal(undispatch(there_and_back(local[0]), key), q)
    assert torch.equal(roll(there_and_back(local[0]), 3, 0, key), roll(local[0], 3, 0, key))


def differentiate_collectives() -> None:
    import torch.distributed._functional_collectives as functional

    q, k, v, _ = leaves()
    flex_flash_attn_func(q, k, v, *tables())[0].mul(weights(q)).sum().backward()
    expected, q.grad, size = q.grad, None, dist.get_world_size()
    shares = [NUM_TOKENS if to == dist.get_rank() else 0 for to in range(size)]
    arrived = functional.all_to_all_single_autograd(q, shares, shares, dist.group.WORLD)
    assert type(arrived) is not Tensor
    flex_flash_attn_func(arrived, k, v, *tables())[0].mul(weights(q)).sum().backward()
    torch.testing.assert_close(q.grad, expected)


def split_heads() -> None:
    """Two ranks of tensor parallelism by two of context parallelism, beside one rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tensor"))
    key, tensor = make_key(mesh["cp"].get_group(), share=2), mesh["tensor"]
    whole = leaves()
    expected, expected_meta = attend(*whole)
    expected.mul(weights(expected)).sum().backward()
    for shards_sink in (True, False):
        placements = [Shard(1)] * 3 + [Shard(1) if shards_sink else Replicate()]
        mine = [
            distribute_tensor(x.detach(), tensor, [placement]).requires_grad_()
            for x, placement in zip(whole, placements, strict=True)
        ]
        local = [dispatch(x, key) for x in mine[:3]]
        out, meta = calc_attn(*local, key, sink=mine[3], return_max_logits=True)
        assert isinstance(out, DTensor) and out.placements == (Shard(1),)
        assert isinstance(meta.lse, DTensor) and meta.lse.placements == (Shard(1),)
        assert isinstance(meta.max_logits, DTensor) and meta.max_logits.placements == (Shard(0),)
        torch.testing.assert_close(meta.max_logits.full_tensor(), expected_meta.max_logits)
        torch.testing.assert_close(undispatch(meta.lse, key).full_tensor(), expected_meta.lse)
        result = undispatch(out, key)
        assert isinstance(result, DTensor) and result.placements == (Shard(1),)
        torch.testing.assert_close(result.full_tensor(), expected)
        result.mul(distribute_tensor(weights(expected), tensor, [Shard(1)])).sum().backward()
        for name, x, one in zip("qkvs", mine, whole, strict=True):
            assert isinstance(x.grad, DTensor), name
            gradient = x.grad.full_tensor()
            if name == "s":  # each rank of context parallelism has its share
                dist.all_reduce(gradient, group=mesh["cp"].get_group())
            torch.testing.assert_close(gradient, one.grad, msg=lambda text, name=name: f"d{name}: {text}")
        rolled = undispatch(roll(local[0].transpose(0, 1), -3, 1, key).transpose(0, 1), key)
        assert torch.equal(rolled.full_tensor(), whole[0].roll(-3, 0))


def split_heads_on_one_device() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = leaves()
    expected, expected_meta = attend(*whole)
    expected.mul(weights(expected)).sum().backward()
    for placement, of_sink in ((Shard(1), Shard(1)), (Shard(1), Replicate()), (Replicate(), Replicate())):
        placements = [placement] * 3 + [of_sink]
        mine = [
            distribute_tensor(x.detach(), mesh, [one]).requires_grad_()
            for x, one in zip(whole, placements, strict=True)
        ]
        for run in (attend, torch.compile(attend_without_loss_of_lse, backend="aot_eager", fullgraph=True)):
            out, meta = run(*mine)
            assert out.placements == meta.lse.placements == (placement,)
            torch.testing.assert_close(out.full_tensor(), expected)
            torch.testing.assert_close(meta.lse.full_tensor(), expected_meta.lse)
            torch.testing.assert_close(meta.max_logits.full_tensor(), expected_meta.max_logits)
            gradients = torch.autograd.grad(
                out.mul(distribute_tensor(weights(expected), mesh, [placement])).sum(), mine
            )
            for name, gradient, x in zip("qkvs", gradients, whole, strict=True):
                assert isinstance(gradient, DTensor), name
                torch.testing.assert_close(
                    gradient.full_tensor(), x.grad, msg=lambda text, name=name: f"d{name}: {text}"
                )


def refuse_other_placements() -> None:
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tensor"))
    q, k, v, sink = (x.detach() for x in leaves())

    def on(mesh: DeviceMesh, *placements: Any) -> list[Any]:
        return [DTensor.from_local(x, mesh, placements, run_check=False) for x in (q, k, v)]

    key = make_key()
    sharded = [distribute_tensor(x, line, [Shard(1)]) for x in (q, k, v)]
    attempts: list[tuple[list[Any], Any]] = [
        (on(line, Shard(0)), None),
        (on(line, Shard(2)), None),
        (on(line, Partial()), None),
        (on(square, Replicate(), Shard(1)), None),
        ([on(line, Replicate())[0], k, v], None),
        ([q, *on(line, Replicate())[1:]], None),
        ([sharded[0], *on(line, Replicate())[1:]], None),
        ([on(square["tensor"], Replicate())[0], *on(square["cp"], Replicate())[1:]], None),
        (sharded, sink),
        (sharded, distribute_tensor(sink, line, [Shard(0)])),
        (on(line, Replicate()), distribute_tensor(sink, line, [Shard(1)])),
    ]
    for given, its_sink in attempts:
        for call in (
            lambda: flex_flash_attn_func(*given, *tables(), sink=its_sink),  # noqa: B023
            lambda: calc_attn(*given, key, its_sink),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"to_local\(\).*local_map"):
                call()
    three_heads = [distribute_tensor(x[:, :3], line, [Shard(1)]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"4 ranks share evenly, got \[29, 3, 16\]"):
        flex_flash_attn_func(*three_heads, *tables())
    with pytest.raises(ValueError, match="q_ranges must be a plain tensor"):
        flex_flash_attn_func(*sharded, on_all(tables()[0], line), *tables()[1:])
    for x in (on(line, Shard(0))[0], on(line, Partial())[0], on(square, Replicate(), Shard(1))[0]):
        for move in movers(key):
            with pytest.raises(ValueError, match=r"to_local\(\).*local_map"):
                move(x)
    sharded_q, sharded_k, sharded_v = sharded
    wrong: list[tuple[Callable[..., Any], str]] = [
        (lambda: flex_flash_attn_func(*sharded, *tables(), q=sharded_q), "multiple values for argument 'q'"),
        (lambda: flex_flash_attn_func(*sharded, *tables(), sharded_v), "positional arguments"),
        (lambda: flex_flash_attn_func(sharded_q, sharded_k), "'v'"),
    ]
    for refused, message in wrong:
        with pytest.raises(TypeError, match=message):
            refused()
    with pytest.raises(ValueError, match=r"ranks \[0, 1, 2, 3\] in both"):
        calc_attn(*sharded, key)
    with pytest.raises(ValueError, match=r"ranks \[0, 1, 2, 3\] in both"):
        dispatch(sharded[0], key)


def on_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(x, mesh, [Replicate()])


def movers(key: DistAttnRuntimeKey) -> list[Callable[[Tensor], Tensor]]:
    return [lambda x: dispatch(x, key), lambda x: undispatch(x, key), lambda x: roll(x, 1, 0, key)]


def refuse_other_wrappers() -> None:
    key = make_key()
    q, k, v, sink = (x.detach() for x in leaves())
    local = [dispatch(x, key) for x in (q, k, v)]
    for at in range(3):
        given = [TwoTensor(x, x) if at == number else x for number, x in enumerate((q, k, v))]
        with pytest.raises(ValueError, match=f"{'qkv'[at]} must be a plain tensor.*got a TwoTensor"):
            flex_flash_attn_func(*given, *tables())
        given = [TwoTensor(x, x) if at == number else x for number, x in enumerate(local)]
        with pytest.raises(ValueError, match=f"{'qkv'[at]} must be a plain tensor.*got a TwoTensor"):
            calc_attn(*given, key)
    with pytest.raises(ValueError, match="sink must be a plain tensor"):
        flex_flash_attn_func(q, k, v, *tables(), sink=TwoTensor(sink, sink))
    with pytest.raises(ValueError, match="sink must be a plain tensor"):
        calc_attn(*local, key, TwoTensor(sink, sink))
    with pytest.raises(ValueError, match="q_ranges must be a plain tensor"):
        flex_flash_attn_func(q, k, v, TwoTensor(tables()[0], tables()[0]), *tables()[1:])
    for move, x in zip(movers(key), (q, local[0], local[0]), strict=True):
        with pytest.raises(ValueError, match="x must be a plain tensor"):
            move(TwoTensor(x, x))


def answer_fake_tensors_with_shapes() -> None:
    key = make_key()
    rows = len(dispatch(torch.zeros(NUM_TOKENS), key))
    mode = FakeTensorMode()
    with mode:
        whole = torch.empty(NUM_TOKENS, HEADS, HEAD_DIM)
        q, k, v = (torch.empty(rows, heads, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for inside in (True, False):  # a fake tensor outside of its mode is as fake
        with mode if inside else torch.enable_grad():
            assert dispatch(whole, key).shape == q.shape
            assert undispatch(q, key).shape == whole.shape
            assert roll(q, 2, 0, key).shape == q.shape
            out, meta = calc_attn(q, k, v, key, return_max_logits=True)
            assert out.shape == q.shape and meta.lse.shape == (rows, HEADS) and meta.max_logits.shape == (HEADS,)
            out.sum().backward()
            assert q.grad is not None and q.grad.shape == q.shape
            q.grad = k.grad = v.grad = None
            with pytest.raises(ValueError, match="k must be"):
                calc_attn(q, k[1:], v, key)
            with pytest.raises(ValueError, match=f"x must be a tensor of {NUM_TOKENS} rows"):
                dispatch(whole[1:], key)
    meta_tensors = [torch.empty(x.shape, device="meta") for x in (q, k, v)]
    assert calc_attn(*meta_tensors, key)[0].shape == q.shape
    assert dispatch(torch.empty(NUM_TOKENS, 3, device="meta"), key).shape == (rows, 3)


def test_results_of_collectives_are_waited_for() -> None:
    shared_pool().run(wait_for_collectives, num_ranks=2)
    shared_pool().run(differentiate_collectives, num_ranks=2)


def test_tensor_parallel_by_context_parallel() -> None:
    shared_pool().run(split_heads, num_ranks=4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
def test_dtensors_on_one_device() -> None:
    shared_pool().run(split_heads_on_one_device, num_ranks=2)


def test_other_placements_are_refused() -> None:
    shared_pool().run(refuse_other_placements, num_ranks=4)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_wrappers_are_refused(num_ranks: int) -> None:
    shared_pool().run(refuse_other_wrappers, num_ranks=num_ranks)


def test_fake_tensors() -> None:
    shared_pool().run(answer_fake_tensors_with_shapes, num_ranks=2)


def test_fake_tensors_on_one_device() -> None:
    with FakeTensorMode():
        q, k, v, sink = leaves()
        out, meta = flex_flash_attn_func(q, k, v, *tables(), sink=sink, return_max_logits=True)
        assert out.shape == q.shape and meta.lse is not None and meta.lse.shape == q.shape[:2]
        out.sum().backward()
    assert q.grad is not None and sink.grad is not None and sink.grad.shape == sink.shape
    out, _ = flex_flash_attn_func(
        *(torch.empty(x.shape, device="meta") for x in (q, k, v)), *(x.to("meta") for x in tables())
    )
    assert out.is_meta and out.shape == q.shape


def test_the_cpu_kernel_reads_no_null_address() -> None:
    """The last guard, behind all others."""
    from magi_attention.kernels import cpu
    from magi_attention.kernels.interface import AttnSettings, KernelMask
    from magi_attention.mask import AttnMask

    if cpu._library() is None:
        pytest.skip("no compiler")
    q, k, v, _ = (x.detach() for x in leaves())
    mask = KernelMask(AttnMask.full(NUM_TOKENS).bands, NUM_TOKENS, NUM_TOKENS)
    with pytest.raises(ValueError, match="TwoTensor that has no memory of its own"):
        cpu.forward(q, TwoTensor(k, k), v, mask, AttnSettings(softmax_scale=1.0))
