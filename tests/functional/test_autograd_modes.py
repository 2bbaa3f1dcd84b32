"""flex_flash_attn_func under checkpoints, offloading hooks, create_graph, inference_mode and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magi_attention.functional import flex_flash_attn_func

HEADS, KV_HEADS, HEAD_DIM, NUM_TOKENS = 4, 2, 16, 23
Attend = Callable[..., tuple[Tensor, Tensor]]


def make_tables() -> tuple[Tensor, Tensor, Tensor]:
    ranges = torch.tensor([[0, 9], [9, 21]], dtype=torch.int32)  # the last two queries attend nothing
    return ranges, ranges.clone(), torch.tensor([1, 0], dtype=torch.int32)


def make_leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and a sink."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)] + [(2, HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def attend(*leaves: Tensor, tables: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, sink = leaves
    out, meta = flex_flash_attn_func(q, k, v, *(tables or make_tables()), sink=sink)
    assert meta.lse is not None
    return out, meta.lse


def attend_in_a_layer(*leaves: Tensor) -> tuple[Tensor, Tensor]:
    """With operations that save tensors before and after."""
    q, k, v, sink = leaves
    out, lse = attend(q.tanh(), k.sin() * k, v.exp(), sink.tanh())
    return out.sin() * out, lse.cos()


def loss_of(out: Tensor, lse: Tensor) -> Tensor:
    return (out * torch.arange(out.numel()).view_as(out).sin()).sum() + lse.square().mean()


def gradients(run: Attend, leaves: list[Tensor] | None = None) -> list[Tensor]:
    leaves = make_leaves() if leaves is None else leaves
    return list(torch.autograd.grad(loss_of(*run(*leaves)), leaves))


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("function", [attend, attend_in_a_layer])
@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}],
    ids=str,
)
def test_checkpoints(function: Attend, options: dict[str, Any]) -> None:
    leaves, expected = make_leaves(), gradients(function)
    # Reentrant checkpoints take no `torch.autograd.grad`.
    loss_of(*checkpoint(function, *leaves, **options)).backward()
    assert_equal([x.grad for x in leaves if x.grad is not None], expected)


def test_offloading_reads_each_saved_tensor_once() -> None:
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(x: Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    def unpack(at: int) -> Tensor:
        unpacked.append(at)
        return packed[at]

    leaves = make_leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out, lse = attend(*leaves)
    num_saved = len(packed)
    loss_of(out, lse).backward()
    assert sorted(unpacked) == list(range(num_saved))
    assert num_saved == 9  # q, k, v, out, lse, sink and three tables


def test_save_on_cpu() -> None:
    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autograd.graph.save_on_cpu():
            return attend_in_a_layer(*leaves)

    assert_equal(gradients(run), gradients(attend_in_a_layer))


@pytest.mark.parametrize("loss", [lambda out, lse: out.square().sum(), lambda out, lse: out.sum() + lse.sum()])
@pytest.mark.parametrize("take", ["backward", "grad", "allow_unused", "among other terms"])
def test_gradients_of_gradients_are_refused(take: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Also where the loss is linear, so that no gradient that comes in depends on q, k or v."""
    leaves = make_leaves()
    grads = torch.autograd.grad(loss(*attend(*leaves)), leaves, create_graph=True)
    expected = torch.autograd.grad(loss(*attend(*leaves)), leaves)
    assert_equal([x.detach() for x in grads], list(expected))
    penalty = sum((x.square().sum() for x in grads), torch.zeros(()))
    differentiate: dict[str, Callable[[], object]] = {
        "backward": penalty.backward,
        "grad": lambda: torch.autograd.grad(penalty, leaves),
        "allow_unused": lambda: torch.autograd.grad(penalty, leaves, allow_unused=True),
        "among other terms": (penalty + leaves[0].sum()).backward,
    }
    with pytest.raises(RuntimeError, match="flex_flash_attn_func is once_differentiable"):
        differentiate[take]()


@pytest.mark.parametrize("unused", ["out", "lse"])
def test_what_is_not_used_costs_no_gradient(unused: str) -> None:
    leaves = make_leaves()
    out, lse = attend(*leaves)
    used = lse if unused == "out" else out
    actual = torch.autograd.grad(used.square().sum(), leaves)
    out, lse = attend(*leaves)
    expected = torch.autograd.grad(
        (out if unused == "lse" else lse).square().sum() + 0 * (out.sum() + lse.sum()), leaves
    )
    torch.testing.assert_close(actual, expected)


def test_tables_made_under_inference_mode() -> None:
    with torch.inference_mode():
        tables = make_tables()
        attend(*make_leaves(), tables=tables)
    expected = gradients(attend)
    assert_equal(gradients(lambda *x: attend(*x, tables=tables)), expected)
    # Writes to such tensors are not counted: each call must read them.
    with torch.inference_mode():
        tables[0][1, 1] = tables[1][1, 1] = 15
    changed = make_tables()
    changed[0][1, 1] = changed[1][1, 1] = 15
    assert_equal(gradients(lambda *x: attend(*x, tables=tables)), gradients(lambda *x: attend(*x, tables=changed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_and_v(dtype: torch.dtype) -> None:
    """As torch's own attention: the same bits as explicit casts, gradients in each input's dtype; the sink stays as it is."""
    for dtypes in ([torch.float32] * 3, [torch.float32, torch.float32, dtype], [torch.float16, torch.bfloat16, dtype]):
        leaves = [
            x.detach().to(d).requires_grad_() for x, d in zip(make_leaves(), [*dtypes, torch.float32], strict=True)
        ]
        with torch.autocast("cpu", dtype=dtype):
            out, lse = attend(*leaves)
        assert out.dtype == dtype and lse.dtype == torch.float32
        actual = torch.autograd.grad(loss_of(out, lse), leaves)
        out, lse = attend(*(x.to(dtype) for x in leaves[:3]), leaves[3])
        assert_equal(list(actual), list(torch.autograd.grad(loss_of(out, lse), leaves)))
        assert [x.dtype for x in actual] == [x.dtype for x in leaves]


def test_autocast_leaves_float64() -> None:
    leaves = make_leaves(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attend(*leaves)
        assert out.dtype == lse.dtype == torch.float64
        actual = torch.autograd.grad(loss_of(out, lse), leaves)  # backward under autocast, too
    assert_equal(list(actual), gradients(attend, leaves))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="one dtype"):
        attend(leaves[0], *(x.float() for x in leaves[1:]))


def test_autocast_that_is_off_casts_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert attend(*make_leaves())[0].dtype == torch.float32
