"""`dispatch`, `calc_attn` and `undispatch` as parts of any graph: what autograd, checkpoints and autocast may do around them.

The oracle is written here, from the definition, in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from magi_attention.api import (
    DistAttnConfig,
    DistAttnRuntimeKey,
    OverlapConfig,
    calc_attn,
    clear_cache,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    undispatch,
)
from magi_attention.testing.dist import shared_pool

CU_SEQLENS = [0, 1, 14, 14, 37]  # a document of one token, one of none
NUM_TOKENS, NUM_HEADS_Q, NUM_HEADS_KV, HEAD_DIM = 37, 4, 2, 8
Leaves = list[Tensor]


def make_key() -> DistAttnRuntimeKey:
    return magi_attn_varlen_key(
        CU_SEQLENS,
        CU_SEQLENS,
        NUM_HEADS_Q,
        NUM_HEADS_KV,
        HEAD_DIM,
        causal=True,
        chunk_size=3,
        dist_attn_config=DistAttnConfig(overlap_config=OverlapConfig(degree=2, min_chunk_size=1)),
    )


def make_leaves(requiring: str = "qkvs", dtype: torch.dtype = torch.float64) -> Leaves:
    """q, k, v and a sink; those named in ``requiring`` require grad."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_TOKENS, heads, HEAD_DIM) for heads in (NUM_HEADS_Q, NUM_HEADS_KV, NUM_HEADS_KV)] + [(2, NUM_HEADS_Q)]
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_(name in requiring) for name, x in zip("qkvs", tensors, strict=True)]


def attend(leaves: Leaves, key: DistAttnRuntimeKey) -> Tensor:
    q, k, v, sink = leaves
    out, _ = calc_attn(dispatch(q, key), dispatch(k, key), dispatch(v, key), key, sink=sink)
    return undispatch(out, key)


def attend_densely(leaves: Leaves) -> Tensor:
    q, k, v, sink = leaves
    document = torch.bucketize(torch.arange(NUM_TOKENS), torch.tensor(CU_SEQLENS), right=True)
    attended = (document[:, None] == document) & torch.ones(NUM_TOKENS, NUM_TOKENS).tril().bool()
    k, v = (x.repeat_interleave(NUM_HEADS_Q // NUM_HEADS_KV, dim=1) for x in (k, v))
    weights = torch.exp(torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD_DIM)) * attended
    total = weights.sum(-1) + sink.exp().sum(0)[:, None]
    return torch.einsum("hij,jhd->ihd", weights / total[..., None], v)


def weighted(out: Tensor) -> Tensor:
    """A loss."""
    return (out * torch.arange(out.numel()).view_as(out).sin()).sum()


def expected_gradients() -> list[Tensor]:
    leaves = make_leaves()
    return list(torch.autograd.grad(weighted(attend_densely(leaves)), leaves))


def check_gradients(leaves: Leaves, times: int = 1, tolerance: float = 1e-10) -> None:
    for name, leaf, expected in zip("qkvs", leaves, expected_gradients(), strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None, name
            torch.testing.assert_close(leaf.grad.double(), times * expected, rtol=tolerance, atol=tolerance)
        else:
            assert leaf.grad is None, name


def use_an_output_twice(key: DistAttnRuntimeKey) -> None:
    leaves = make_leaves()
    out = attend(leaves, key)
    (weighted(out) + weighted(2 * out)).backward()
    check_gradients(leaves, 3)


def add_up_gradients(key: DistAttnRuntimeKey) -> None:
    leaves = make_leaves()
    for _ in range(2):
        weighted(attend(leaves, key)).backward()
    loss = weighted(attend(leaves, key))
    loss.backward(retain_graph=True)
    loss.backward()
    check_gradients(leaves, 4)


def differentiate_through_other_operations(key: DistAttnRuntimeKey) -> None:
    leaves = make_leaves()
    weighted(attend([2 * x / 2 for x in leaves], key)).backward()
    check_gradients(leaves)


def differentiate_only_some(key: DistAttnRuntimeKey) -> None:
    for requiring in ("q", "k", "v", "s", "qs", "kv"):
        leaves = make_leaves(requiring)
        weighted(attend(leaves, key)).backward()
        check_gradients(leaves)


def give_views_of_one_tensor(key: DistAttnRuntimeKey) -> None:
    x, sink = make_leaves()[0], make_leaves()[3]
    local = dispatch(x, key)
    out = undispatch(calc_attn(local, local[:, :2], local[:, 2:], key, sink=sink)[0], key)
    expected = attend_densely([x, x[:, :2], x[:, 2:], sink])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(weighted(out), (x, sink)), torch.autograd.grad(weighted(expected), (x, sink))
    )


def take_an_expanded_gradient(key: DistAttnRuntimeKey) -> None:
    leaves, dense = make_leaves(), make_leaves()
    attend(leaves, key).sum().backward()
    attend_densely(dense).sum().backward()
    torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in dense])


def recompute_in_checkpoints(key: DistAttnRuntimeKey) -> None:
    for options in ({"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}):
        leaves = make_leaves()
        out = checkpoint(lambda *tensors: attend(list(tensors), key), *leaves, **options)
        torch.testing.assert_close(out, attend_densely(leaves))
        weighted(out).backward()
        check_gradients(leaves)


def switch_gradients_off(key: DistAttnRuntimeKey) -> None:
    expected = attend_densely(make_leaves())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attend(make_leaves(), key)
        assert not out.requires_grad
        torch.testing.assert_close(out.clone(), expected.detach())
    assert not attend(make_leaves(""), key).requires_grad


def compute_under_autocast(key: DistAttnRuntimeKey) -> None:
    """q, k and v are cast as by torch's own attention, float64 is not; the sink keeps its dtype."""
    half = torch.bfloat16
    for dtypes in ([torch.float32] * 3, [torch.float32, torch.float32, half]):
        dtypes = [*dtypes, torch.float32]
        leaves = [x.detach().to(d).requires_grad_() for x, d in zip(make_leaves(), dtypes, strict=True)]
        with torch.autocast("cpu", dtype=half):
            out = attend(leaves, key)
        actual = torch.autograd.grad(weighted(out), leaves)
        cast = attend([*(x.to(half) for x in leaves[:3]), leaves[3]], key)
        assert out.dtype == half and torch.equal(out, cast)
        assert [x.dtype for x in actual] == dtypes
        assert all(map(torch.equal, actual, torch.autograd.grad(weighted(cast), leaves)))
    leaves = make_leaves()
    with torch.autocast("cpu", dtype=half):
        weighted(attend(leaves, key)).backward()
    check_gradients(leaves)


def offload_what_is_saved(key: DistAttnRuntimeKey) -> None:
    """Each saved tensor is read once, because hooks pay for every reading."""
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(x: Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    def unpack(at: int) -> Tensor:
        unpacked.append(at)
        return packed[at]

    leaves = make_leaves()
    local = [dispatch(x, key) for x in leaves[:3]]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out, _ = calc_attn(*local, key, sink=leaves[3])
    weighted(undispatch(out, key)).backward()
    check_gradients(leaves)
    assert sorted(unpacked) == list(range(len(packed))) and len(packed) == 6
    leaves = make_leaves()
    with torch.autograd.graph.save_on_cpu():
        out = attend(leaves, key)
    weighted(out).backward()
    check_gradients(leaves)


def refuse_gradients_of_gradients(key: DistAttnRuntimeKey) -> None:
    """Also where the loss is linear, and where the answer for an input that is not used would be None."""
    local = [dispatch(x, key).detach().requires_grad_() for x in make_leaves()[:3]]
    for power in (1, 2):
        grads = torch.autograd.grad(calc_attn(*local, key)[0].pow(power).sum(), local, create_graph=True)
        penalty = sum((x.square().sum() for x in grads), torch.zeros(()))
        with pytest.raises(RuntimeError, match="calc_attn is once_differentiable"):
            torch.autograd.grad(penalty, local, allow_unused=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="calc_attn is once_differentiable"):
            (penalty + local[0].sum()).backward()


def train_with_a_key_of_inference_mode(_: DistAttnRuntimeKey) -> None:
    clear_cache()
    with torch.inference_mode():
        key = make_key()
        attend(make_leaves(), key)
        get_position_ids(key)
    leaves = make_leaves()
    weighted(attend(leaves, key)).backward()
    check_gradients(leaves)


def refuse_what_is_not_supported(key: DistAttnRuntimeKey) -> None:
    leaves = make_leaves()
    (dq,) = torch.autograd.grad(weighted(attend(leaves, key)), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):  # gradients of gradients: torch says so, rather than give zeros
        dq.sum().backward()
    local = [dispatch(x, key) for x in leaves[:3]]
    out, meta = calc_attn(*local, key, return_max_logits=True)
    assert meta.lse is not None and meta.max_logits is not None
    assert meta.lse.requires_grad and not meta.max_logits.requires_grad
    with torch.no_grad():
        local[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def reduce_the_gradient_of_sinks(key: DistAttnRuntimeKey) -> None:
    expected, size = expected_gradients()[3], dist.get_world_size()
    for op in ("none", "sum", "avg"):
        os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"] = op
        leaves = make_leaves()
        weighted(attend(leaves, key)).backward()
        share = leaves[3].grad
        assert share is not None
        if op == "none":
            assert size == 1 or not torch.allclose(share, expected)
            dist.all_reduce(share)
        torch.testing.assert_close(size * share if op == "avg" else share, expected)


def keep_what_padding_holds_apart(key: DistAttnRuntimeKey) -> None:
    """NaN in padding rows and in the gradient of their output reaches no other row, nor is it in the output."""
    for backend, dtype in (("reference", torch.float64), ("tiled", torch.float32), ("cpu", torch.float32)):
        os.environ["MAGI_ATTENTION_BACKEND"] = backend
        leaves = make_leaves(dtype=dtype)
        local = [dispatch(x, key, pad_value=math.nan) for x in leaves[:3]]
        out, meta = calc_attn(*local, key, sink=leaves[3], return_max_logits=True)
        assert meta.lse is not None and meta.max_logits is not None
        assert not any(x.isnan().any() for x in (out, meta.lse, meta.max_logits)), backend
        (dout,) = torch.autograd.grad(weighted(undispatch(out, key)), out, retain_graph=True)
        dout[dispatch(torch.zeros(NUM_TOKENS), key, pad_value=1.0) == 1] = math.nan
        out.backward(dout)
        check_gradients(leaves, tolerance=1e-10 if dtype == torch.float64 else 1e-4)


CHECKS: list[Callable[[DistAttnRuntimeKey], None]] = [
    use_an_output_twice,
    add_up_gradients,
    differentiate_through_other_operations,
    differentiate_only_some,
    give_views_of_one_tensor,
    take_an_expanded_gradient,
    recompute_in_checkpoints,
    switch_gradients_off,
    compute_under_autocast,
    offload_what_is_saved,
    refuse_gradients_of_gradients,
    train_with_a_key_of_inference_mode,
    refuse_what_is_not_supported,
    reduce_the_gradient_of_sinks,
    keep_what_padding_holds_apart,
]


def check(function: Callable[[DistAttnRuntimeKey], None]) -> None:
    os.environ["MAGI_ATTENTION_DSINK_ALL_REDUCE_OP"] = "sum"
    function(make_key())


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_on_ranks(function: Callable[[DistAttnRuntimeKey], None]) -> None:
    shared_pool().run(check, function, num_ranks=3)
