"""Carry out a plan with row numbers in place of rows, and compare what comes out with the mask."""

from __future__ import annotations

import numpy as np

from magi_attention.mask.bands import Ints, expand, to_dense
from magi_attention.plan import AttnPlan


def deliver(plan: AttnPlan, stage: int) -> list[Ints]:
    """What every rank's receive buffer holds after an exchange: global k positions, ``[num_received]`` for each rank."""
    mail: list[list[Ints]] = [[] for _ in range(plan.num_ranks)]
    for source in range(plan.num_ranks):
        exchange = plan.rank(source).stages[stage].exchange
        starts, ends = exchange.send_ranges.T
        rows = plan.k_layout.positions(source)[expand(starts, ends - starts)[1]]
        assert len(rows) == exchange.num_sent, f"rank {source} lays out {len(rows)} rows but sends {exchange.num_sent}"
        for destination, letter in enumerate(np.split(rows, np.cumsum(exchange.send_splits)[:-1])):
            expected = plan.rank(destination).stages[stage].exchange.recv_splits[source]
            assert len(letter) == expected, (
                f"rank {source} sends {len(letter)} rows to {destination}, which expects {expected}"
            )
            mail[destination].append(letter)
    return [np.concatenate(letters) for letters in mail]


def count_planned_cells(plan: AttnPlan) -> Ints:
    """``[padded_q, padded_k]``: how often the ranks, in all stages, compute each cell."""
    count = np.zeros((plan.q_layout.padded_seqlen, plan.k_layout.padded_seqlen), np.int64)
    buffers = [deliver(plan, stage) for stage in range(plan.num_stages)]
    for rank in range(plan.num_ranks):
        part, q_rows = plan.rank(rank), plan.q_layout.positions(rank)
        steps = [(part.host_bands, plan.k_layout.positions(rank))]
        steps += [(stage.bands, buffers[number][rank]) for number, stage in enumerate(part.stages)]
        for bands, k_rows in steps:
            assert not len(bands) or (bands[:, 1].max() <= len(q_rows) and bands[:, 3].max() <= len(k_rows))
            np.add.at(count, np.ix_(q_rows, k_rows), to_dense(bands, len(q_rows), len(k_rows)))
    return count


def check_cells(plan: AttnPlan) -> None:
    """Every attended cell is computed exactly once, and no other is."""
    expected = np.zeros((plan.q_layout.padded_seqlen, plan.k_layout.padded_seqlen), np.int64)
    expected[: plan.mask.num_q, : plan.mask.num_k] = plan.mask.to_dense()
    wrong = np.argwhere(count_planned_cells(plan) != expected)
    assert not len(wrong), (
        f"{len(wrong)} cells are computed another number of times than once, first (q, k) = {wrong[0]}"
    )


def check_deliveries(plan: AttnPlan) -> None:
    """Every rank receives exactly the keys that its queries attend and that it does not hold, each once."""
    dense = plan.mask.to_dense()
    buffers = [deliver(plan, stage) for stage in range(plan.num_stages)]
    for rank in range(plan.num_ranks):
        queries = plan.q_layout.positions(rank)
        attended = np.flatnonzero(dense[queries[queries < plan.mask.num_q]].any(axis=0))
        demanded = np.setdiff1d(attended, plan.k_layout.positions(rank))
        received = np.concatenate([np.empty(0, np.int64), *(buffer[rank] for buffer in buffers)])
        assert len(np.unique(received)) == len(received), f"rank {rank} receives a row twice"
        assert np.array_equal(np.sort(received), demanded), f"rank {rank} receives other rows than it demands"
