"""dispatch, undispatch and roll as operators: compiled, exported, checked by torch, differentiated again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from magi_attention.api import (
    AttnRole,
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    calc_attn,
    clear_cache,
    dispatch,
    magi_attn_flex_key,
    roll,
    undispatch,
)
from magi_attention.comm.row_format import RowFormat
from magi_attention.runtime import mover_ops
from magi_attention.testing.dist import shared_pool

Run = Callable[[Tensor, DistAttnRuntimeKey], tuple[Tensor, ...]]


def make_key(total: int, total_k: int | None = None, uneven: bool = False) -> DistAttnRuntimeKey:
    return magi_attn_flex_key(
        [[0, total]],
        [[0, total_k or total]],
        "full",
        total,
        total_k or total,
        2,
        1,
        16,
        chunk_size=3,
        dist_attn_config=DistAttnConfig(dispatch_config=DispatchConfig(uneven_shard=uneven)),
        is_same_source=total_k is None,
    )


def widths(x: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, ...]:
    """Rows of 4, 8 and 32 floats in one region, as inputs, views of inputs and results."""
    local = dispatch(x, key, pad_value=2.0)
    wide = roll(local @ x.new_ones(8, 32).cumsum(1).cos(), -1, 0, key)
    return undispatch(local[:, :4], key), undispatch(local, key), undispatch(wide, key), roll(local.T, 3, 1, key)


def partial_gradients(x: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, ...]:
    return undispatch(dispatch(x, key), key, is_partial_grad=True), undispatch(dispatch(x[:, :2], key), key)


def around_attention(x: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, ...]:
    heads = (dispatch(x, key) @ x.new_ones(8, 64).cumsum(1).sin()).unflatten(1, (4, 16))
    out, _ = calc_attn(heads[:, :2], heads[:, 2:3], heads[:, 3:], key)
    return (undispatch(out.flatten(1), key),)


def of_keys(x: Tensor, key: DistAttnRuntimeKey) -> tuple[Tensor, ...]:
    local = dispatch(x, key, attn_role=AttnRole.KEY)
    return undispatch(roll(local, 5, 0, key, attn_role=AttnRole.VALUE), key, attn_role=AttnRole.KEY), local


def compile_regions() -> None:
    regions: list[tuple[Run, list[DistAttnRuntimeKey]]] = [
        (widths, [make_key(24), make_key(40), make_key(31, uneven=True)]),
        (partial_gradients, [make_key(29)]),
        (around_attention, [make_key(31)]),
        (of_keys, [make_key(9, 29)]),
    ]
    for region, keys in regions:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(region, fullgraph=True, backend=counter)
        for key in keys:
            total = key.total_seqlen_k if region is of_keys else key.total_seqlen_q
            x = torch.randn(total, 8, generator=torch.Generator().manual_seed(total))
            results = []
            for run in (region, compiled):
                leaf = x.clone().requires_grad_()
                given = run(leaf, key)
                sum((one * (at + one)).sum() for at, one in enumerate(given)).backward()
                assert leaf.grad is not None
                results.append([*given, leaf.grad])
            for expected, actual in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= 2, (
            f"{region.__name__} was compiled {counter.frame_count} times for {len(keys)} keys"
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks for on every input
def test_compiled() -> None:
    shared_pool().run(compile_regions, num_ranks=2)


def compile_two_undispatches() -> None:
    """Inputs of the graph that are views of one tensor, gathered without gradients."""
    key, x = make_key(24), torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    local = dispatch(x, key)

    def gather(local: Tensor) -> tuple[Tensor, Tensor]:
        return undispatch(local[:, :4], key), undispatch(local, key)

    for expected, actual in zip(gather(local), torch.compile(gather, backend="aot_eager")(local), strict=True):
        assert torch.equal(actual, expected)


def test_views_of_one_tensor() -> None:
    shared_pool().run(compile_two_undispatches, num_ranks=2)


def compile_with_inductor() -> None:
    key, x = make_key(24), torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(widths, fullgraph=True)
    grads = []
    for run in (widths, compiled):
        leaf = x.clone().requires_grad_()
        sum(one.square().sum() for one in run(leaf, key)).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_inductor() -> None:
    shared_pool().run(compile_with_inductor, num_ranks=2)


def test_errors_under_compile() -> None:
    key = make_key(24)
    compiled = torch.compile(widths, backend="aot_eager")
    with pytest.raises(ValueError, match="x must be a tensor of 24 rows"):
        compiled(torch.randn(23, 8), key)
    x = torch.randn(24, 8)
    compiled(x, key)
    clear_cache()
    with pytest.raises(ValueError, match="no plan stands behind this key"):
        compiled(x, key)


class Moves(nn.Module):
    def __init__(self, key: DistAttnRuntimeKey) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return widths(x, self.key) + around_attention(x, self.key)


def export_moves() -> None:
    key = make_key(29)
    x = torch.randn(29, 8, generator=torch.Generator().manual_seed(0))
    for strict in (True, False):
        exported = torch.export.export(Moves(key), (x,), strict=strict)
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert {
            f"magi_attention.{name}.default" for name in ("dispatch", "undispatch", "roll", "distributed_attn")
        } <= called
        for expected, actual in zip(Moves(key)(x), exported.module()(x), strict=True):
            assert torch.equal(actual, expected)


def test_export() -> None:
    shared_pool().run(export_moves, num_ranks=2)


def check_operators() -> None:
    for key in (make_key(13), make_key(13, uneven=True)):
        assert key.num_local_rows is not None
        rows, handle = key.num_local_rows[0], key.handle
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(3, 13, generator=generator).T.requires_grad_()  # strided
        local = torch.randn(rows, 3, generator=generator).requires_grad_()
        torch.library.opcheck(mover_ops.dispatch, (whole, handle, rows, False, 1.5))
        torch.library.opcheck(mover_ops.dispatch_sum, (whole, handle, rows, False))
        torch.library.opcheck(mover_ops.roll, (local, handle, -2, False))
        for is_partial_grad in (True, False):
            torch.library.opcheck(mover_ops.undispatch, (local, handle, 13, False, is_partial_grad))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_operators_keep_torchs_rules(num_ranks: int) -> None:
    """Schema, fake results, gradients, dynamic shapes, aliases: torch's own checks of an operator."""
    shared_pool().run(check_operators, num_ranks=num_ranks)


def differentiate_twice() -> None:
    """The movers are linear, so the gradient of a gradient's square goes through their adjoints again."""
    key = make_key(13)
    assert key.num_local_rows is not None
    rows, generator = key.num_local_rows[0], torch.Generator().manual_seed(0)
    x = torch.randn(13, 3, generator=generator, dtype=torch.float64).requires_grad_()
    mine = torch.randn(rows, 3, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    handle = key.handle
    for eager, operator in (
        (lambda x: dispatch(x, key), lambda x: mover_ops.dispatch(x, handle, rows, False, 0.0)),
        (lambda x: undispatch(mine * dispatch(x, key), key), None),
        (lambda x: undispatch(mine * dispatch(x, key), key, is_partial_grad=True), None),
        (
            lambda x: roll(mine * dispatch(x, key), 2, 0, key),
            lambda x: mover_ops.roll(mine * dispatch(x, key), handle, 2, False),
        ),
    ):
        second = []
        for move in (eager, operator or torch.compile(eager, backend="eager")):
            out = move(x)
            (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), x)[0])
        assert second[0].abs().sum() > 0
        torch.testing.assert_close(*second)
    # With weights alike on every rank, the gradient of sum(first ** 2) is that of one device: 36 x ** 3.
    (first,) = torch.autograd.grad(dispatch(x, key).pow(3).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(again, 36 * x**3)


def test_gradients_of_gradients() -> None:
    shared_pool().run(differentiate_twice, num_ranks=2)


def test_formats_of_rows_are_not_mistaken_under_compile() -> None:
    """AOTAutograd gives a view in another dtype, of a second width, a wrong shape."""
    torch._dynamo.reset()
    views, pack = (torch.compile(one, backend="aot_eager") for one in (RowFormat.views, RowFormat.pack))
    for width in (4, 8, 16):
        x = torch.randn(12, width, generator=torch.Generator().manual_seed(width))
        row_format = RowFormat.of((x,))
        assert torch.equal(pack(row_format, (x,)), row_format.pack((x,)))
        assert torch.equal(views(row_format, row_format.pack((x,)))[0], x)
