"""Carry out a plan with row numbers in place of rows, and compare what comes out with the mask."""

from __future__ import annotations

import numpy as np

from magi_attention.mask.bands import Ints, expand
from magi_attention.plan import AttnPlan, Exchange, ShardLayout, StagePlan


def deliver(exchanges: list[Exchange], held: list[Ints]) -> list[Ints]:
    """What every rank's receive buffer holds after an exchange (``exchanges``, one a rank) of the rows that they hold: global positions."""
    sent = np.array([exchange.send_splits for exchange in exchanges], np.int64)  # [source, destination]
    expected = np.array([exchange.recv_splits for exchange in exchanges], np.int64).T
    for source, destination in np.argwhere(sent != expected).tolist():
        got, wanted = int(sent[source, destination]), int(expected[source, destination])
        raise AssertionError(f"rank {source} sends {got} rows to {destination}, not {wanted}")
    letters = []
    for source, exchange in enumerate(exchanges):
        starts, ends = exchange.send_ranges.T
        letters.append(held[source][expand(starts, ends - starts)[1]])
        rows = len(letters[-1])
        assert rows == exchange.num_sent, f"rank {source} lays out {rows} rows but sends {exchange.num_sent}"
    destination_of = np.repeat(np.tile(np.arange(len(exchanges)), len(exchanges)), sent.ravel())
    by_destination = np.argsort(destination_of, kind="stable")  # of one destination, by source
    return np.split(np.concatenate(letters)[by_destination], np.cumsum(sent.sum(axis=0))[:-1])


def _held(layout: ShardLayout) -> list[Ints]:
    return [layout.positions(rank) for rank in range(layout.num_ranks)]


def _stages(plan: AttnPlan, backward: bool) -> list[tuple[StagePlan, ...]]:
    """``[stage][rank]``."""
    parts = [plan.rank(rank) for rank in range(plan.num_ranks)]
    return list(zip(*(part.backward_stages if backward else part.stages for part in parts), strict=True))


def relay_deliveries(plan: AttnPlan, backward: bool = False) -> list[list[Ints]]:
    """``[stage][rank]``: the global positions of the keys that cross between nodes; nothing without hierarchy."""
    held = _held(plan.k_layout)
    result = []
    for of_stage in _stages(plan, backward):
        relays = [stage.relay for stage in of_stage if stage.relay is not None]
        result.append(deliver(relays, held) if relays else [np.empty(0, np.int64)] * plan.num_ranks)
    return result


def key_deliveries(plan: AttnPlan, backward: bool = False) -> list[list[Ints]]:
    """``[stage][rank]``: the global positions of the keys that arrive, by whatever way."""
    held, relayed = _held(plan.k_layout), relay_deliveries(plan, backward)
    result = []
    for number, of_stage in enumerate(_stages(plan, backward)):
        rows = [np.concatenate([own, more]) for own, more in zip(held, relayed[number], strict=True)]
        result.append(deliver([stage.exchange for stage in of_stage], rows))
    return result


def guest_deliveries(plan: AttnPlan) -> list[Ints]:
    """``[rank]``: the global positions of the queries that arrive as guests."""
    guests = [plan.rank(rank).guests for rank in range(plan.num_ranks)]
    given = [guest for guest in guests if guest is not None]
    assert len(given) in (0, plan.num_ranks), "either every rank takes part in moving queries or none does"
    if not given:
        return [np.empty(0, np.int64)] * plan.num_ranks
    return deliver([guest.exchange for guest in given], _held(plan.q_layout))


def count_planned_cells(plan: AttnPlan, backward: bool = False) -> Ints:
    """``[padded_q, padded_k]``: how often the ranks, in all stages, compute each cell.

    Raises:
        AssertionError: a table that leaves its buffer, or a rank that computes another number of cells than ``plan.areas`` says.
    """
    buffers, guests = key_deliveries(plan, backward), guest_deliveries(plan)
    shape = plan.q_layout.padded_seqlen, plan.k_layout.padded_seqlen
    cells = [np.empty(0, np.int64)]
    for rank in range(plan.num_ranks):
        part, q_rows, k_rows = plan.rank(rank), plan.q_layout.positions(rank), plan.k_layout.positions(rank)
        steps = [(part.host_bands, q_rows, k_rows)]
        for number, stage in enumerate(part.backward_stages if backward else part.stages):
            steps.append((stage.bands, q_rows, buffers[number][rank]))
        if part.guests is not None:
            steps.append((part.guests.bands, guests[rank], k_rows))
        of_rank = [_cells(*step) @ (shape[1], 1) for step in steps]
        num_cells = sum(map(len, of_rank))
        assert num_cells == plan.areas[rank], f"rank {rank} computes {num_cells} cells, not {plan.areas[rank]}"
        cells += of_rank
    return np.bincount(np.concatenate(cells), minlength=shape[0] * shape[1]).reshape(shape)


def _cells(bands: Ints, q_rows: Ints, k_rows: Ints) -> Ints:
    """``[n, 2]``: the global query and key of every cell of a table in the rows of two buffers."""
    q0, q1, k0, k1, lo, hi = bands.T
    assert not len(bands) or (min(q0.min(), k0.min()) >= 0 and q1.max() <= len(q_rows) and k1.max() <= len(k_rows))
    row, query = expand(q0, q1 - q0)
    begin, end = np.maximum(k0[row], query + lo[row]), np.minimum(k1[row], query + hi[row] + 1)
    at, key = expand(begin, np.maximum(end - begin, 0))
    return np.stack([q_rows[query[at]], k_rows[key]], axis=1)


def check_cells(plan: AttnPlan) -> None:
    """Every attended cell is computed exactly once, and no other is, forward and backward."""
    expected = np.zeros((plan.q_layout.padded_seqlen, plan.k_layout.padded_seqlen), np.int64)
    expected[: plan.mask.num_q, : plan.mask.num_k] = plan.mask.to_dense()
    for backward in (False, True):
        wrong = np.argwhere(count_planned_cells(plan, backward) != expected)
        assert not len(wrong), f"{len(wrong)} cells are computed another number of times than once, first {wrong[0]}"


def check_deliveries(plan: AttnPlan) -> None:
    """Every rank receives exactly the rows that it computes with and does not hold, each once, forward and backward."""
    dense = plan.mask.to_dense()
    guests, none = guest_deliveries(plan), np.empty(0, np.int64)
    k_rank = np.empty(plan.k_layout.padded_seqlen, np.int64)
    for rank in range(plan.num_ranks):
        k_rank[plan.k_layout.positions(rank)] = rank
    chunk_of_query = np.searchsorted(plan.q_layout.chunk_edges, np.arange(plan.mask.num_q), side="right") - 1
    moved = np.zeros((plan.q_layout.num_chunks, plan.num_ranks), bool) if plan.moved is None else plan.moved
    away = moved[chunk_of_query][:, k_rank[: plan.mask.num_k]] & dense  # cells computed where the key lives
    at_home = dense & ~away
    deliveries = [key_deliveries(plan, backward) for backward in (False, True)]
    for rank in range(plan.num_ranks):
        queries = plan.q_layout.positions(rank)
        queries = queries[queries < plan.mask.num_q]
        attended = np.flatnonzero(at_home[queries].any(axis=0))
        demanded = np.setdiff1d(attended, plan.k_layout.positions(rank))
        keys_here = plan.k_layout.positions(rank)
        visiting = np.flatnonzero(away[:, keys_here[keys_here < plan.mask.num_k]].any(axis=1))
        for of_pass in deliveries:
            received = np.concatenate([none, *(buffer[rank] for buffer in of_pass)])
            _same_once(received, demanded, f"rank {rank}, keys")
        _same_once(guests[rank], visiting, f"rank {rank}, guests")
    if plan.ranks_per_node is not None:
        _check_crossings(plan)


def _check_crossings(plan: AttnPlan) -> None:
    """A row crosses to a node once in all, exactly if some rank there needs it and no rank there holds it."""
    assert plan.ranks_per_node is not None
    for backward in (False, True):
        crossed, arrived = relay_deliveries(plan, backward), key_deliveries(plan, backward)
        for first in range(0, plan.num_ranks, plan.ranks_per_node):
            node = range(first, first + plan.ranks_per_node)
            none = [np.empty(0, np.int64)]
            at_home = np.concatenate([plan.k_layout.positions(rank) for rank in node])
            needed = np.unique(np.concatenate(none + [of_stage[rank] for of_stage in arrived for rank in node]))
            _same_once(
                np.concatenate(none + [of_stage[rank] for of_stage in crossed for rank in node]),
                np.setdiff1d(needed, at_home),
                f"rows that cross to the node of rank {first}",
            )


def _same_once(received: Ints, demanded: Ints, what: str) -> None:
    assert len(np.unique(received)) == len(received), f"{what}: a row arrives twice"
    assert np.array_equal(np.sort(received), demanded), f"{what}: other rows arrive than are needed"
