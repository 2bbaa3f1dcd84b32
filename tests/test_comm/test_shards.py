"""Whole tensors of shards and shards of sums, small agreed values, for equal and unequal shares."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from comm_cases import random_rows

from magi_attention.comm import (
    all_reduce_max,
    assert_same_plan,
    dsink_all_reduce,
    dsink_all_reduce_op,
    gather_rows,
    reduce_scatter_rows,
)
from magi_attention.testing.dist import RankError, shared_pool

COUNTS = [[5], [3, 3], [4, 0, 7], [0, 0, 0], [1, 1, 1, 1], [0, 9, 2, 0]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]


def check_gather(counts: list[int], dtype: torch.dtype) -> None:
    for shape in ((), (3,), (2, 5)):
        shards = [x.ge(0) if dtype == torch.bool else (10 * x).to(dtype) for x in random_rows(7, counts, *shape)]
        whole = gather_rows(shards[dist.get_rank()], counts, dist.group.WORLD)
        assert whole.dtype == dtype and torch.equal(whole, torch.cat(shards))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_rows_lays_shards_end_to_end(counts: list[int], dtype: torch.dtype) -> None:
    shared_pool().run(check_gather, counts, dtype, num_ranks=len(counts))


def check_reduce_scatter(counts: list[int], dtype: torch.dtype) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    wholes = [random_rows(seed, [sum(counts)], 2, 3, dtype=dtype)[0] for seed in range(size)]
    begin = sum(counts[:rank])
    expected = torch.zeros(counts[rank], 2, 3, dtype=torch.promote_types(dtype, torch.float32))
    for whole in wholes:
        expected += whole[begin : begin + counts[rank]]
    got = reduce_scatter_rows(wholes[rank].transpose(0, 1).contiguous().transpose(0, 1), counts, dist.group.WORLD)
    assert got.dtype == dtype and torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reduce_scatter_rows_sums_in_rank_order(counts: list[int], dtype: torch.dtype) -> None:
    shared_pool().run(check_reduce_scatter, counts, dtype, num_ranks=len(counts))


def reduce_small(op: str) -> tuple[torch.Tensor, torch.Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    logits = torch.tensor([-math.inf, rank, -rank, -math.inf if rank else 2.5], dtype=torch.float64)
    unchanged = logits.clone()
    largest = all_reduce_max(logits, group)
    assert torch.equal(logits, unchanged)
    return largest, dsink_all_reduce(torch.full((2, 3), float(rank + 1)), op, group)


@pytest.mark.parametrize(("op", "totals"), [("none", [1, 2, 3]), ("sum", [6, 6, 6]), ("avg", [2, 2, 2])])
def test_small_values_are_reduced_over_all_ranks(op: str, totals: list[float]) -> None:
    for (largest, dsink), total in zip(shared_pool().run(reduce_small, op, num_ranks=3), totals, strict=True):
        assert largest.tolist() == [-math.inf, 2, 0, 2.5]
        assert torch.equal(dsink, torch.full((2, 3), float(total)))


def test_one_rank_needs_no_group() -> None:
    x = torch.randn(4, 2)
    assert gather_rows(x, [4], None) is x
    assert reduce_scatter_rows(x, [4], None) is x
    assert all_reduce_max(x, None) is x
    assert torch.equal(dsink_all_reduce(x, "sum", None), x) and torch.equal(dsink_all_reduce(x, "avg", None), x)
    assert_same_plan(b"plan", None)


def test_the_environment_says_how_dsink_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", raising=False)
    assert dsink_all_reduce_op() == "none"
    monkeypatch.setenv("MAGI_ATTENTION_DSINK_ALL_REDUCE_OP", "avg")
    assert dsink_all_reduce_op() == "avg"


def compare(digests: list[bytes]) -> str:
    try:
        assert_same_plan(digests[dist.get_rank()], dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "same"


def test_ranks_that_plan_something_else_are_named_on_every_rank() -> None:
    a, b, c = (bytes([n]) * 32 for n in (1, 2, 200))
    pool = shared_pool()
    assert pool.run(compare, [a] * 4) == ["same"] * 4
    said = pool.run(compare, [b, a, c, a])
    assert len(set(said)) == 1 and "rank(s) 0, 2 differ from rank(s) 1, 3" in said[0]
    assert "rank(s) 1 differ from rank(s) 0." in pool.run(compare, [a, b], num_ranks=2)[0]


def test_a_wrong_op_is_our_own_bug() -> None:
    with pytest.raises(RankError, match="AssertionError: product"):
        shared_pool().run(reduce_small, "product", num_ranks=2)
