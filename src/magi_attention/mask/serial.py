"""Masks as JSON text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from magi_attention.mask.builders import make_mask

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
        ValueError: not such a text, or rows outside the lengths or of cells listed twice.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"a mask as JSON must be what to_json writes, got no JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f'a mask as JSON must be what to_json writes, with "format": "{_FORMAT}", got {text[:80]!r}')
    missing = {"num_q", "num_k", "rows"} - set(fields)
    if missing:
        raise ValueError(f"a mask as JSON needs the fields num_q, num_k and rows, but {sorted(missing)} are missing")
    rows = np.array(fields["rows"], dtype=object)
    if not all(isinstance(value, int) for value in [*rows.ravel(), fields["num_q"], fields["num_k"]]) or (
        rows.size and (rows.ndim != 2 or rows.shape[1] != 6)
    ):
        raise ValueError(f"a mask as JSON needs rows of six ints and lengths that are ints, got {text[:80]!r}")
    mask = make_mask(rows.astype(np.int64), fields["num_q"], fields["num_k"])
    mask.validate()
    return mask
