"""Rows between the global tensor and the shards: identities, adjoints, rolls, positions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from magi_attention.api import (
    AttnRole,
    DispatchConfig,
    DistAttnConfig,
    DistAttnRuntimeKey,
    dispatch,
    get_position_ids,
    magi_attn_flex_key,
    roll,
    undispatch,
)
from magi_attention.testing.dist import shared_pool


def make_key(
    total_q: int, chunk_size: int | None, uneven: bool = False, total_k: int | None = None
) -> DistAttnRuntimeKey:
    total_k_ = total_q if total_k is None else total_k
    return magi_attn_flex_key(
        [[0, total_q]],
        [[0, total_k_]],
        "causal" if total_k is None else "full",
        total_q,
        total_k_,
        2,
        1,
        8,
        chunk_size=chunk_size,
        dist_attn_config=DistAttnConfig(dispatch_config=DispatchConfig(uneven_shard=uneven)),
        is_same_source=total_k is None,
    )


LAYOUTS = [(24, 3, False), (29, 4, False), (29, 4, True), (1, None, False), (7, 2, True), (64, None, False)]


def check_identity() -> None:
    for total, chunk_size, uneven in LAYOUTS:
        key = make_key(total, chunk_size, uneven)
        x = torch.randn(total, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        local = dispatch(x, key, pad_value=7.0)
        positions = get_position_ids(key)
        assert torch.equal(undispatch(local, key), x)
        real = (local != 7.0).all(dim=(1, 2))
        assert torch.equal(local[real], x[positions[real]])
        assert (positions[~real] == total - 1).all()


def check_gradients() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for total, chunk_size, uneven in LAYOUTS:
        key = make_key(total, chunk_size, uneven)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(total, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(size, total, 2, generator=generator, dtype=torch.float64)
        # Every rank weighs its rows by position: the gradient of x is the weights, whole on every rank.
        local = dispatch(x, key)
        positions = get_position_ids(key)
        (local * weights[0][positions]).sum().backward()  # what padding rows get is dropped
        assert x.grad is not None
        assert torch.allclose(x.grad, weights[0])
        # The same loss on every rank of the gathered tensor: each keeps its rows.
        rows = dispatch(x.detach(), key).requires_grad_()
        (undispatch(rows, key) * weights[0]).sum().backward()
        assert rows.grad is not None
        assert torch.equal(rows.grad, dispatch(weights[0], key))
        # Another share of the loss on every rank: they are summed.
        rows = dispatch(x.detach(), key).requires_grad_()
        (undispatch(rows, key, is_partial_grad=True) * weights[rank]).sum().backward()
        assert rows.grad is not None
        assert torch.allclose(rows.grad, dispatch(weights.sum(dim=0), key))


def check_roll() -> None:
    for total, chunk_size, uneven in LAYOUTS:
        key = make_key(total, chunk_size, uneven)
        x = torch.randn(total, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for shift in (0, 1, -1, 5, -13, total, 2 * total + 3):
            local = dispatch(x, key).requires_grad_()
            rolled = roll(local, shift, 0, key)
            assert torch.equal(undispatch(rolled, key), torch.roll(x, shift, 0))
            sideways = roll(local.t().contiguous(), shift, -1, key)
            assert torch.equal(sideways, rolled.t())
            # The adjoint: <roll(x), y> = <x, roll^T(y)>, over all ranks.
            y = torch.randn_like(rolled)
            (gradient,) = torch.autograd.grad(rolled, local, y)
            products = torch.stack([(rolled * y).sum(), (local * gradient).sum()]).detach()
            dist.all_reduce(products)
            assert torch.allclose(products[0], products[1])


def check_two_sides() -> None:
    key = make_key(29, 4, total_k=53)
    q = torch.arange(29.0)[:, None]
    k = torch.arange(53.0)[:, None]
    assert torch.equal(undispatch(dispatch(q, key), key), q)
    for role in (AttnRole.KEY, AttnRole.VALUE):
        assert torch.equal(undispatch(dispatch(k, key, attn_role=role), key, attn_role=role), k)
        assert torch.equal(
            undispatch(roll(dispatch(k, key, attn_role=role), 3, 0, key, attn_role=role), key, attn_role=role),
            torch.roll(k, 3, 0),
        )
        positions = get_position_ids(key, attn_role=role)
        local = dispatch(k, key, pad_value=-1.0, attn_role=role)[:, 0]
        assert torch.equal(local[local >= 0], positions[local >= 0].float())
        assert (positions[local < 0] == 52).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("check", [check_identity, check_gradients, check_roll, check_two_sides])
def test_rows(check: object, num_ranks: int) -> None:
    shared_pool().run(check, num_ranks=num_ranks)


def test_one_rank_without_a_process_group() -> None:
    key = make_key(29, 4)
    x = torch.randn(29, 3)
    assert torch.equal(undispatch(dispatch(x, key), key), x)
    assert torch.equal(undispatch(roll(dispatch(x, key), -1, 0, key), key), torch.roll(x, -1, 0))


def check_odd_tensors() -> None:
    key, generator = make_key(19, 2), torch.Generator().manual_seed(4)
    x = torch.randn(38, 6, generator=generator)
    tensors = [
        torch.arange(19),
        torch.arange(19, dtype=torch.uint8),
        torch.arange(19) % 2 == 0,
        x[:19, :3].bfloat16(),
        x[:19, 0].half(),
        torch.complex(x[:19], x[19:]).conj(),
        x[::2, ::3],
        x[:5, :].t()[:1].expand(19, 5),
        torch.zeros(19, 0),
        torch.zeros(19, 0, 4),
    ]
    for one in tensors:
        local = dispatch(one, key)
        assert torch.equal(undispatch(local, key), one)
        assert torch.equal(undispatch(roll(local, -3, 0, key), key), torch.roll(one, -3, 0))


def test_tensors_of_any_dtype_width_and_stride() -> None:
    shared_pool().run(check_odd_tensors, num_ranks=3)
