"""A plan's mask in a terminal: which rank computes what."""

from __future__ import annotations

import string

import numpy as np

from magi_attention.mask.bands import area, split_k, split_q
from magi_attention.plan import AttnPlan
from magi_attention.viz.pieces import planned_pieces

_SYMBOLS = string.digits + string.ascii_lowercase + string.ascii_uppercase


def plan_to_string(plan: AttnPlan, max_rows: int = 32, max_columns: int = 64) -> str:
    """A drawing of characters, queries downwards and keys to the right: in each field the rank that computes most of it.

    Ranks are 0 to 9, a to z, A to Z, and from rank 62 on the same again; a field of no cell is a space.
    """
    mask, pieces = plan.mask, planned_pieces(plan)
    num_rows, num_columns = min(max_rows, max(mask.num_q, 1)), min(max_columns, max(mask.num_k, 1))
    q_edges = np.linspace(0, mask.num_q, num_rows + 1).round().astype(np.int64)
    k_edges = np.linspace(0, mask.num_k, num_columns + 1).round().astype(np.int64)
    parts, of_piece, row = split_q(pieces.bands, q_edges[:-1], q_edges[1:])
    parts, of_part, column = split_k(parts, k_edges[:-1], k_edges[1:])
    cells = np.zeros((num_rows, num_columns, plan.num_ranks))
    np.add.at(cells, (row[of_part], column, pieces.rank[of_piece[of_part]]), area(parts))
    busiest, some = cells.argmax(axis=2), cells.any(axis=2)
    symbols = np.where(some, np.array(list(_SYMBOLS))[busiest % len(_SYMBOLS)], " ")
    lines = ["".join(line) for line in symbols.tolist()]
    edge = "─" * num_columns
    title = f"AttnPlan: {mask.num_q:,} queries x {mask.num_k:,} keys on {plan.num_ranks:,} ranks, host stage + {plan.num_stages} remote"
    return "\n".join([title, f"┌{edge}┐", *(f"│{line}│" for line in lines), f"└{edge}┘"])
