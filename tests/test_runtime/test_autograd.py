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
    dispatch,
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
    for use_reentrant in (False, True):
        leaves = make_leaves()
        out = checkpoint(lambda *tensors: attend(list(tensors), key), *leaves, use_reentrant=use_reentrant)
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
    leaves = make_leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(leaves, key)
        weighted(out).backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), attend_densely(make_leaves()), rtol=1e-5, atol=1e-5)
    check_gradients(leaves, tolerance=1e-4)


def refuse_what_is_not_supported(key: DistAttnRuntimeKey) -> None:
    leaves = make_leaves()
    (dq,) = torch.autograd.grad(weighted(attend(leaves, key)), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError):  # gradients of gradients: torch says so, rather than give zeros
        dq.sum().backward()
    local = [dispatch(x, key) for x in leaves[:3]]
    out, meta = calc_attn(*local, key, return_max_logits=True)
    assert meta.lse is not None and meta.max_logits is not None
    assert not meta.lse.requires_grad and not meta.max_logits.requires_grad
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
    """NaN in padding rows reaches no other row, forward or backward, nor is it in the output."""
    for backend, dtype in (("reference", torch.float64), ("tiled", torch.float32), ("cpu", torch.float32)):
        os.environ["MAGI_ATTENTION_BACKEND"] = backend
        leaves = make_leaves(dtype=dtype)
        local = [dispatch(x, key, pad_value=math.nan) for x in leaves[:3]]
        out, meta = calc_attn(*local, key, sink=leaves[3], return_max_logits=True)
        assert meta.lse is not None and meta.max_logits is not None
        assert not any(x.isnan().any() for x in (out, meta.lse, meta.max_logits)), backend
        weighted(undispatch(out, key)).backward()
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
