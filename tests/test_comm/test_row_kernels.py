"""The GPU's row kernels, in the interpreter where there is none, against torch's functions, which serve elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from comm_cases import exchange_of_rank, random_exchanges, random_rows
from torch import Tensor

pytest.importorskip("triton")

from magi_attention.comm import exchange_rows, row_kernels
from magi_attention.comm.exchange_rows import group_reduce, group_reduce_lse, owners, sent_rows
from magi_attention.comm.row_format import RowFormat
from magi_attention.comm.row_kernels import Owners, can_take, gather_rows_into, merge_rows_, sum_rows_
from magi_attention.plan import Exchange

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of one row: few and many columns, and a number that fills no block.
SHAPES = [(), (2, 5), (3, 400)]


def exchanges() -> list[tuple[int, Exchange]]:
    """``(num_rows, exchange)`` of every rank of a random one: one sends nothing, the others each row to several."""
    num_rows, sent = random_exchanges(0, 4)
    return [(num_rows[rank], exchange_of_rank(sent, rank)) for rank in range(4)]


def rows_on_device(seed: int, num_rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return random_rows(seed, [num_rows], *shape, dtype=dtype)[0].to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_gather(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for num_rows, exchange in exchanges():
        wide = rows_on_device(0, num_rows, 3, *shape, dtype=torch.float64).to(dtype)
        tensors = (wide[:, 1], rows_on_device(1, num_rows, 2, dtype=torch.float32))  # strided rows, and a neighbour
        row_format, index = RowFormat.of(tensors), sent_rows(exchange, DEVICE)
        expected = row_format.views(row_format.gather(tensors, index))
        views = row_format.views(row_format.empty(len(index), DEVICE))
        for view, x in zip(views, tensors, strict=True):
            assert can_take(x)
            gather_rows_into(view, x, index)
        assert all(torch.equal(view, x) for view, x in zip(views, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sum_is_in_the_order_of_ranks(dtype: torch.dtype, wide: torch.dtype, shape: tuple[int, ...]) -> None:
    """The same bits as one source after another gives."""
    for num_rows, exchange in exchanges():
        into = rows_on_device(0, num_rows, *shape, dtype=wide)
        arrived = rows_on_device(1, exchange.num_sent, *shape, dtype=dtype)
        expected = into.clone()
        group_reduce_by_torch(arrived, expected, exchange)
        sum_rows_(into, arrived, Owners(*owners(exchange, DEVICE)))
        assert torch.equal(into, expected)


def group_reduce_by_torch(arrived: Tensor, into: Tensor, exchange: Exchange) -> None:
    for part, at in exchange_rows._by_source(arrived, exchange):
        into.index_add_(0, at, part.to(into.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_merge(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for num_rows, exchange in exchanges():
        out, lse = rows_on_device(0, num_rows, 2, 24, dtype=wide), rows_on_device(1, num_rows, 2, dtype=wide)
        part = rows_on_device(2, exchange.num_sent, 2, 24, dtype=dtype)
        part_lse = rows_on_device(3, exchange.num_sent, 2, dtype=wide)
        # Queries that attend nothing, on either side and on both.
        for x, x_lse in ((out, lse), (part, part_lse)):
            empty = x_lse > 0.5
            x_lse[empty], x[empty] = -math.inf, 0.0
        expected = out.clone(), lse.clone()
        merge_by_torch(part, part_lse, expected, exchange)
        merge_rows_(out, lse, part, part_lse, Owners(*owners(exchange, DEVICE)))
        rtol = 1e-5 if wide == torch.float32 else 1e-12
        torch.testing.assert_close((out, lse), expected, rtol=rtol, atol=rtol)


def merge_by_torch(part: Tensor, part_lse: Tensor, into: tuple[Tensor, Tensor], exchange: Exchange) -> None:
    sources = zip(exchange_rows._by_source(part, exchange), exchange_rows._by_source(part_lse, exchange), strict=True)
    for (out_part, at), (lse_part, _) in sources:
        out, lse = into[0].index_select(0, at), into[1].index_select(0, at)
        exchange_rows.merge_partial_(out, lse, out_part, lse_part)
        into[0].index_copy_(0, at, out)
        into[1].index_copy_(0, at, lse)


def test_exchanges_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels and without, on one rank: a group-cast's rows, their sums at home, and attention merged there."""
    exchange = Exchange(send_ranges=torch.tensor([[1, 4], [6, 9]]).numpy(), send_splits=(6,), recv_splits=(6,))
    x = rows_on_device(0, 9, 2, 5, dtype=torch.float32)
    lse = rows_on_device(1, 9, 2, dtype=torch.float32)

    def run() -> list[Tensor]:
        (got,) = exchange_rows.group_cast((x,), exchange, None).wait()
        total, (out, merged) = x.clone(), (x.clone(), lse.clone())
        group_reduce((got,), (total,), exchange, None).wait()
        group_reduce_lse(got * 2, lse[:6] + 1, (out, merged), exchange, None).wait()
        return [got.clone(), total, out, merged]

    monkeypatch.setattr(exchange_rows, "_kernels", lambda *_: None)
    expected = run()
    monkeypatch.setattr(exchange_rows, "_kernels", lambda *_: row_kernels)
    for actual, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)


def test_what_they_do_not_take() -> None:
    heads_first = torch.zeros(3, 8, 4).transpose(0, 1)
    assert not can_take(heads_first) and not can_take(torch.zeros(4, 2, dtype=torch.complex128))
    assert can_take(torch.zeros(0, 3, 4), torch.zeros(5, 6, 4)[:, 2:4])
