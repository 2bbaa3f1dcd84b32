"""Which rank computes which cells in which stage, in global coordinates: what pictures of plans are made of.

A plan tells a rank its cells in the coordinates of its own buffers. Here the mask itself is cut instead: by who owns the queries, then by
when that rank has the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magi_attention.mask.bands import Ints, split_k, split_q
from magi_attention.mask.simplify import merge_bands
from magi_attention.plan import AttnPlan
from magi_attention.plan.demand import BEGIN, DST, END, STAGE, union_by_group

# Stages: the rank's own keys, remote stages from 1 on, and cells computed as another rank's guest.
HOST, GUEST = 0, -1


@dataclass(frozen=True, eq=False)
class PlannedPieces:
    """``bands`` ``[n, 6]`` disjoint rows that hold all attended cells; ``rank``, ``stage`` ``[n]``: who computes them, and when.

    Stage 0 is the rank's own keys, stage ``s`` those of the ``s``-th exchange of the forward pass, and -1 marks queries that
    moved: ``rank`` computes them for the rank that owns them.
    """

    bands: Ints
    rank: Ints
    stage: Ints


def planned_pieces(plan: AttnPlan) -> PlannedPieces:
    """All cells of the plan's mask by rank and stage of the forward pass."""
    parts = [_pieces_of(plan, rank) for rank in range(plan.num_ranks)]
    return PlannedPieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _pieces_of(plan: AttnPlan, rank: int) -> tuple[Ints, Ints, Ints]:
    runs = plan.q_layout.rank_runs(rank)
    bands, _, _ = split_q(plan.mask.bands, runs[:, 0], runs[:, 1])
    bands, guests, hosts = _apart_from_guests(plan, rank, bands)
    intervals = _keys_by_stage(plan, rank)
    pieces, _, at = split_k(bands, intervals[:, 1], intervals[:, 2])
    stage = intervals[at, 0]
    found = [(HOST, merge_bands(pieces[stage == HOST]))]
    found += [(int(one), merge_bands(pieces[stage == one])) for one in np.unique(stage[stage != HOST])]
    own = np.concatenate([part for _, part in found])
    stages = np.repeat([one for one, _ in found], [len(part) for _, part in found])
    return (
        np.concatenate([own, guests]),
        np.concatenate([np.full(len(own), rank), hosts]),
        np.concatenate([stages, np.full(len(guests), GUEST)]).astype(np.int64),
    )


def _keys_by_stage(plan: AttnPlan, rank: int) -> Ints:
    """``[n, 3]`` rows ``(stage, begin, end)``, ascending by key: when ``rank`` has which keys."""
    own = plan.k_layout.rank_runs(rank)[:, :2]
    table = plan.forward.table
    arriving = table[table[:, DST] == rank]
    stage = np.concatenate([np.zeros(len(own), np.int64), arriving[:, STAGE] + 1])
    begin, end = np.concatenate([own, arriving[:, [BEGIN, END]]]).T
    intervals = union_by_group(stage, begin, end)
    return intervals[np.argsort(intervals[:, 1], kind="stable")]


def _apart_from_guests(plan: AttnPlan, rank: int, bands: Ints) -> tuple[Ints, Ints, Ints]:
    """The rank's rows less those whose queries move, those rows, and ``[g]`` the ranks that compute them."""
    none = np.empty((0, 6), np.int64)
    if plan.moved is None:
        return bands, none, np.empty(0, np.int64)
    chunks = plan.q_layout.rank_chunks(rank)
    edges = plan.q_layout.chunk_edges
    pieces, _, at = split_q(bands, edges[chunks], edges[chunks + 1])
    runs = plan.k_layout.runs
    parts, piece, run = split_k(pieces, runs[:, 0], runs[:, 1])
    host = runs[run, 2]
    is_guest = plan.moved[chunks[at[piece]], host]
    return parts[~is_guest], parts[is_guest], host[is_guest]
