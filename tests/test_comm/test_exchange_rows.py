"""Group-cast delivers the planned rows; group-reduce is its adjoint; the lse-weighted one is attention over all keys at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from comm_cases import delivered, exchange_of_rank, random_exchanges, random_rows
from torch import Tensor

from magi_attention.comm import group_cast, group_reduce, group_reduce_lse
from magi_attention.plan import Exchange
from magi_attention.testing.dist import shared_pool

WORLD_SIZES = (1, 2, 3, 4)
NUM_SEEDS = 12


def my_exchange(seed: int) -> tuple[list[int], list[list], Exchange]:
    num_rows, sent = random_exchanges(seed, dist.get_world_size())
    return num_rows, sent, exchange_of_rank(sent, dist.get_rank())


def check_casts(dtypes: tuple[torch.dtype, ...]) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    for seed in range(NUM_SEEDS):
        num_rows, sent, exchange = my_exchange(seed)
        shapes = ((2, 5), (2, 3), ())
        everyone = [random_rows(seed + 100 * n, num_rows, *shapes[n], dtype=dtype) for n, dtype in enumerate(dtypes)]
        received = group_cast([rows[rank] for rows in everyone], exchange, group).wait()
        assert len(received) == len(dtypes)
        for rows, got in zip(everyone, received, strict=True):
            assert got.dtype == rows[rank].dtype
            assert torch.equal(got, delivered(rows, sent, rank))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16,),
        (torch.bfloat16, torch.float32, torch.int64),
    ],
    ids=str,
)
def test_group_cast_delivers_the_planned_rows(num_ranks: int, dtypes: tuple[torch.dtype, ...]) -> None:
    shared_pool().run(check_casts, dtypes, num_ranks=num_ranks)


def check_views() -> None:
    rank = dist.get_rank()
    num_rows, sent, exchange = my_exchange(3)
    wide = random_rows(0, num_rows, 6, 4, dtype=torch.float32)
    k, v = wide[rank].transpose(0, 1).contiguous().transpose(0, 1), wide[rank][:, ::2, 1:]
    got_k, got_v = group_cast((k, v), exchange, dist.group.WORLD).wait()
    assert torch.equal(got_k, delivered(wide, sent, rank))
    assert torch.equal(got_v, delivered([x[:, ::2, 1:] for x in wide], sent, rank))
    assert got_k.untyped_storage().data_ptr() == got_v.untyped_storage().data_ptr()
    if exchange.num_received:
        assert got_k.stride() == (33, 4, 1) and got_v.stride() == (33, 3, 1)


def test_strided_tensors_travel_together_and_arrive_as_views_of_one_buffer() -> None:
    shared_pool().run(check_views, num_ranks=4)


def check_adjoint() -> None:
    """``sum over ranks <cast(x), y> == <x, reduce(y)>``, with y in float64 throughout."""
    rank, group = dist.get_rank(), dist.group.WORLD
    for seed in range(NUM_SEEDS):
        num_rows, _, exchange = my_exchange(seed)
        k, v = (random_rows(seed + n, num_rows, *shape)[rank] for n, shape in enumerate(((3, 4), (3, 2))))
        cast = group_cast((k, v), exchange, group).wait()
        partials = tuple(torch.randn(x.shape, dtype=x.dtype) for x in cast)
        sums = torch.ones_like(k), torch.ones_like(v)
        pending = group_reduce(partials, sums, exchange, group)
        assert pending.wait() is None
        pending.wait()  # asked again, nothing is added again
        left = sum((a * b).sum() for a, b in zip(cast, partials, strict=True))
        right = sum((a * (b - 1)).sum() for a, b in zip((k, v), sums, strict=True))
        both = torch.stack([torch.as_tensor(left), torch.as_tensor(right)])
        dist.all_reduce(both)
        torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_group_reduce_is_the_adjoint_of_group_cast(num_ranks: int) -> None:
    shared_pool().run(check_adjoint, num_ranks=num_ranks)


def returned(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(sum made by group_reduce, the same sum made row by row in the order of ranks)`` for rows that travel as bfloat16."""
    rank, size = dist.get_rank(), dist.get_world_size()
    num_rows, sent, exchange = my_exchange(seed)
    partials = random_rows(seed, [exchange_of_rank(sent, r).num_received for r in range(size)], 3, dtype=torch.float32)
    total, expected = torch.zeros(num_rows[rank], 3, dtype=dtype), torch.zeros(num_rows[rank], 3, dtype=dtype)
    group_reduce((partials[rank],), (total,), exchange, dist.group.WORLD, transit_dtype=torch.bfloat16).wait()
    for user in range(size):
        begin = sum(len(sent[source][user]) for source in range(rank))
        for place, row in enumerate(sent[rank][user]):
            expected[row] += partials[user][begin + place].to(torch.bfloat16).to(dtype)
    return total, expected


def check_transit() -> list[Tensor]:
    totals = []
    for seed in range(NUM_SEEDS):
        for dtype in (torch.float32, torch.float64):
            total, expected = returned(seed, dtype)
            assert torch.equal(total, expected)  # in the order of ranks: bit for bit
            totals.append(total)
    return totals


def test_rows_travel_in_the_transit_dtype_and_are_summed_in_rank_order() -> None:
    pool = shared_pool()
    once, again = pool.run(check_transit, num_ranks=4), pool.run(check_transit, num_ranks=4)
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def attend(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` ``[num_q, 2, 3]``, ``[num_q, 2]`` in float64 over the keys that ``mask`` ``[num_q, num_k]`` leaves."""
    logits = torch.einsum("qhd,khd->qhk", q, k).masked_fill(~mask.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    return torch.einsum("qhk,khd->qhd", torch.exp(logits - lse.unsqueeze(-1)).nan_to_num(0.0), k), lse


def check_lse() -> None:
    """Queries travel to the owners of keys; merging what comes back is attention over all keys."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for seed in range(NUM_SEEDS):
        num_rows, sent, exchange = my_exchange(seed)
        q, k = random_rows(seed, num_rows, 2, 3), random_rows(seed + 1, [5] * size, 2, 3)
        generator = torch.Generator().manual_seed(seed)
        # Half of the cells are masked: some queries attend nothing of what they visit, and some nothing at all.
        masks = [torch.rand(rows, 5 * size, generator=generator) < 0.1 for rows in num_rows]
        for source in range(size):
            for target in range(size):
                visited = torch.zeros(num_rows[source], dtype=torch.bool)
                visited[torch.from_numpy(sent[source][target])] = True
                masks[source][:, 5 * target : 5 * target + 5] &= visited.unsqueeze(1) | (source == target)
        own = slice(5 * rank, 5 * rank + 5)
        self_sent = torch.zeros(num_rows[rank], dtype=torch.bool)
        self_sent[torch.from_numpy(sent[rank][rank])] = True
        out, lse = attend(q[rank], k[rank], masks[rank][:, own] & ~self_sent.unsqueeze(1))
        (visitors,) = group_cast((q[rank],), exchange, group).wait()
        (visitor_masks,) = group_cast((masks[rank],), exchange, group).wait()
        partial_out, partial_lse = attend(visitors, k[rank], visitor_masks[:, own])
        group_reduce_lse(partial_out, partial_lse, (out, lse), exchange, group).wait()
        expected_out, expected_lse = attend(q[rank], torch.cat(k), masks[rank])
        torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_group_reduce_lse_is_attention_over_all_keys(num_ranks: int) -> None:
    shared_pool().run(check_lse, num_ranks=num_ranks)


def check_lse_transit() -> int:
    """Only out is rounded on the way; lse is not. Returns the rows that were sent."""
    group, num_sent = dist.group.WORLD, 0
    for seed in range(NUM_SEEDS):
        num_rows, _, exchange = my_exchange(seed)
        partial_out = torch.randn(exchange.num_received, 1, 3)
        partial_lse = torch.randn(exchange.num_received, 1)
        results = []
        for travelling, transit in ((partial_out, torch.bfloat16), (partial_out.to(torch.bfloat16).float(), None)):
            out, lse = (
                torch.zeros(num_rows[dist.get_rank()], 1, 3),
                torch.full((num_rows[dist.get_rank()], 1), -math.inf),
            )
            group_reduce_lse(travelling, partial_lse, (out, lse), exchange, group, transit_dtype=transit).wait()
            results.append((out, lse))
        (out, lse), (twin_out, twin_lse) = results
        assert torch.equal(out, twin_out) and torch.equal(lse, twin_lse)
        num_sent += exchange.num_sent
    return num_sent


def test_group_reduce_lse_rounds_only_the_output_in_transit() -> None:
    assert sum(shared_pool().run(check_lse_transit, num_ranks=2)) > 0


def check_overlap() -> None:
    """Two casts and a reduce in flight at once, waited for in another order than started."""
    rank, group = dist.get_rank(), dist.group.WORLD
    parts = [my_exchange(seed) for seed in (5, 6)]
    rows = [random_rows(seed, parts[n][0], 64) for n, seed in enumerate((5, 6))]
    casts = [group_cast((rows[n][rank],), part[2], group, label=f"cast {n}") for n, part in enumerate(parts)]
    total = torch.zeros(parts[0][0][rank], 64, dtype=torch.float64)
    ones = torch.ones(parts[0][2].num_received, 64, dtype=torch.float64)
    reduce = group_reduce((ones,), (total,), parts[0][2], group)
    for n in (1, 0):
        assert torch.equal(casts[n].wait()[0], delivered(rows[n], parts[n][1], rank))
    reduce.wait()
    users = torch.zeros(parts[0][0][rank], dtype=torch.float64)
    for target in parts[0][1][rank]:
        users[torch.from_numpy(target)] += 1
    assert torch.equal(total, users.unsqueeze(1).expand(-1, 64))


def test_exchanges_overlap() -> None:
    shared_pool().run(check_overlap, num_ranks=4)


def test_without_a_group_rows_stay_where_they_are() -> None:
    _, sent = random_exchanges(4, 1)
    exchange = exchange_of_rank(sent, 0)
    assert exchange.num_sent
    x = torch.randn(int(exchange.send_ranges.max()), 2, 3, requires_grad=True)
    (got,) = group_cast((x,), exchange, None).wait()
    assert torch.equal(got, x[torch.from_numpy(sent[0][0])])
    total = torch.zeros(x.shape)
    group_reduce((got,), (total,), exchange, None).wait()
    assert torch.equal(total[torch.from_numpy(sent[0][0])], got)
