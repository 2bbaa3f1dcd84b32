"""Masks as JSON text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from magi_attention.mask.bands import Ints
from magi_attention.mask.builders import make_mask
from magi_attention.mask.inputs import MOST_TOKENS, check_length

if TYPE_CHECKING:
    from magi_attention.mask.attn_mask import AttnMask

_FORMAT = "magi_attention.mask/1"


def to_json(mask: AttnMask) -> str:
    """The mask as JSON: its lengths, and its rows ``[q0, q1, k0, k1, lo, hi]`` (cell ``(i, j)`` of the rectangle is attended
    when ``lo <= j - i <= hi``)."""
    text = {"format": _FORMAT, "num_q": mask.num_q, "num_k": mask.num_k, "rows": mask.bands.tolist()}
    return json.dumps(text, separators=(",", ":"))


def from_json(text: str) -> AttnMask:
    """The mask that `to_json` wrote: an equal value.

    Raises:
        ValueError: not such a text, lengths that are none, or rows outside the lengths or of cells listed twice. A bound of a diagonal
            may be any int: beyond the lengths it bounds nothing.
    """
    try:
        fields = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"a mask as JSON must be the text that to_json writes, got {type(text).__name__} of no JSON: {error}"
        ) from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f'a mask as JSON must be what to_json writes, with "format": "{_FORMAT}", got {text[:80]!r}')
    missing = {"num_q", "num_k", "rows"} - set(fields)
    if missing:
        raise ValueError(f"a mask as JSON needs the fields num_q, num_k and rows, but {sorted(missing)} are missing")
    num_q, num_k = (check_length(fields[name], name) for name in ("num_q", "num_k"))
    mask = make_mask(_as_rows(fields["rows"], num_q, num_k, text), num_q, num_k)
    mask.validate()
    return mask


def _as_rows(rows: Any, num_q: int, num_k: int, text: str) -> Ints:
    """``[n, 6]``, with the bounds of diagonals cut to what any mask's cells can have."""
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 6 and all(type(value) is int for value in row) for row in rows
    ):
        raise ValueError(f"a mask as JSON needs rows of six ints [q0, q1, k0, k1, lo, hi], got {text[:80]!r}")
    for at, (q0, q1, k0, k1, *_) in enumerate(rows):
        if not (0 <= q0 <= q1 <= num_q and 0 <= k0 <= k1 <= num_k):
            raise ValueError(
                f"row {at} of a mask as JSON must lie inside its {num_q:,} queries and {num_k:,} keys, got queries [{q0}, {q1}) and keys "
                f"[{k0}, {k1})"
            )
    cut = [[*row[:4], *(max(-MOST_TOKENS, min(bound, MOST_TOKENS)) for bound in row[4:])] for row in rows]
    return np.array(cut, np.int64).reshape(-1, 6)
