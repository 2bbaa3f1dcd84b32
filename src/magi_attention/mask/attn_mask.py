"""A mask as a value: what is attended among ``num_q`` queries and ``num_k`` keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.enum import AttnMaskType
from magi_attention.mask import bands as band_table
from magi_attention.mask import blocks, builders, cells, columns, combine, documents, draw, serial
from magi_attention.mask.bands import Ints
from magi_attention.mask.inputs import MOST_TOKENS, as_array, as_ints, as_pairs, check_length
from magi_attention.mask.simplify import simplify as _simplify

_SHADES = " ░▒▓█"


@dataclass(frozen=True, eq=False)
class AttnMask:
    """A frozen, hashable attention mask.

    ``bands``: ``[n, 6]`` int64, tight rows (see ``mask.bands``), read-only. ``num_q``, ``num_k``: lengths in tokens. Queries that no row
    holds attend nothing. Lengths are below 2^31, as int32 ranges have it; a longer one is a ValueError, as is a number of a row
    beyond that, on either side of 0: a tight row has none.

    Two masks are equal when their tables and lengths are: the same cells cut differently are different values.
    """

    bands: Ints
    num_q: int
    num_k: int

    def __post_init__(self) -> None:
        for name in ("num_q", "num_k"):
            object.__setattr__(self, name, check_length(getattr(self, name), name))
        table = as_array(self.bands, "bands")
        if table.size and (table.dtype.kind not in "iu" or max(-int(table.min()), int(table.max())) > MOST_TOKENS):
            raise ValueError(
                "bands must be tight rows of six ints (q0, q1, k0, k1, lo, hi), none beyond "
                f"{MOST_TOKENS:,} on either side of 0, got {table.dtype} from {table.min()} to {table.max()}; for rows that bound "
                "nothing on one side, use slices (from_slices) or give the rectangle's own bound"
            )
        if table.size % 6 or (table.size and table.shape[-1] != 6):
            raise ValueError(f"bands must be rows of six ints, shape [n, 6], got shape {list(table.shape)}")
        table = np.ascontiguousarray(table, dtype=np.int64).reshape(-1, 6)
        if table is self.bands or table.base is not None:
            table = table.copy()
        table.setflags(write=False)
        object.__setattr__(self, "bands", table)

    @classmethod
    def from_slices(
        cls,
        q_ranges: Any,
        k_ranges: Any,
        attn_mask_type: Any = AttnMaskType.FULL,
        num_q: int | None = None,
        num_k: int | None = None,
    ) -> AttnMask:
        """The mask of a list of slices.

        Args:
            q_ranges, k_ranges: `AttnRanges`, lists of pairs, or ``[n, 2]`` arrays or tensors: half-open token ranges.
            attn_mask_type: one type for all slices or one for each: `AttnMaskType`, its string or its int; or ``[n]`` ints, array or
                tensor.
            num_q, num_k: lengths in tokens; left out, the largest end.

        Raises:
            ValueError: lists of different lengths, a range that is reversed or outside the lengths, an unknown type.
        """
        q_pairs, k_pairs = _as_pairs(q_ranges, "q_ranges"), _as_pairs(k_ranges, "k_ranges")
        types = _as_types(attn_mask_type, len(q_pairs))
        if not len(q_pairs) == len(k_pairs) == len(types):
            raise ValueError(
                "a mask needs one q_range, one k_range and one type for each slice, got "
                f"{len(q_pairs)} q_ranges, {len(k_pairs)} k_ranges and {len(types)} types"
            )
        num_q = int(q_pairs.max(initial=0)) if num_q is None else check_length(num_q, "num_q")
        num_k = int(k_pairs.max(initial=0)) if num_k is None else check_length(num_k, "num_k")
        _check_ranges(q_pairs, num_q, "q_range")
        _check_ranges(k_pairs, num_k, "k_range")
        return cls(band_table.bands_from_slices(q_pairs, k_pairs, types), num_q, num_k)

    full = staticmethod(builders.full)
    causal = staticmethod(builders.causal)
    varlen = staticmethod(builders.varlen)
    sliding_window = staticmethod(builders.sliding_window)
    block_causal = staticmethod(builders.block_causal)
    varlen_block_causal = staticmethod(builders.varlen_block_causal)
    chunked_causal = staticmethod(builders.chunked_causal)
    dilated_blocks = staticmethod(builders.dilated_blocks)
    strided_blocks = staticmethod(builders.strided_blocks)
    prefix_lm = staticmethod(builders.prefix_lm)
    varlen_prefix_lm = staticmethod(builders.varlen_prefix_lm)
    shared_prefix = staticmethod(builders.shared_prefix)
    multimodal = staticmethod(builders.multimodal)
    cross_attention = staticmethod(builders.cross_attention)

    from_cu_seqlens = staticmethod(builders.varlen)
    from_document_ids = staticmethod(documents.from_document_ids)
    from_position_ids = staticmethod(documents.from_position_ids)
    from_attention_mask = staticmethod(documents.from_attention_mask)
    from_dense = staticmethod(cells.from_dense)
    block_sparse = staticmethod(blocks.block_sparse)
    from_block_indices = staticmethod(blocks.from_block_indices)
    from_startend_row_indices = staticmethod(columns.from_startend_row_indices)
    from_json = staticmethod(serial.from_json)
    to_cu_seqlens = documents.to_cu_seqlens
    to_json = serial.to_json

    union = combine.union
    intersection = combine.intersection
    attends_same = combine.attends_same
    restrict = combine.restrict
    shift = combine.shift
    concat = combine.concat
    transpose = combine.transpose
    simplify = _simplify
    plot = draw.plot

    @property
    def area(self) -> int:
        """Attended cells."""
        return band_table.num_cells(self.bands)

    @property
    def sparsity(self) -> float:
        """Share of the ``num_q x num_k`` cells that is not attended."""
        return 1.0 - self.area / max(self.num_q * self.num_k, 1)

    def validate(self) -> None:
        """ValueError where rows lie outside the lengths or a cell is listed twice."""
        _check_ranges(self.bands[:, :2], self.num_q, "q_range")
        _check_ranges(self.bands[:, 2:4], self.num_k, "k_range")
        band_table.check_disjoint(self.bands)

    def to_slices(self) -> tuple[Ints, Ints, Ints]:
        """Slices of the four types: ``(q_ranges [m, 2], k_ranges [m, 2], types [m])`` int64, at most three a row."""
        return band_table.slices_from_bands(self.bands)

    @staticmethod
    def from_mask_mod(mask_mod: Any, num_q: int, num_k: int | None = None, **options: Any) -> AttnMask:
        """The mask of a flex_attention ``mask_mod(b, h, q, k)``, exactly: see `mask.flex.from_mask_mod`."""
        from magi_attention.mask import flex  # which imports torch

        return flex.from_mask_mod(mask_mod, num_q, num_k, **options)

    @staticmethod
    def from_block_mask(block_mask: Any, **options: Any) -> AttnMask:
        """The mask of a flex_attention ``BlockMask``, exactly: see `mask.flex.from_block_mask`."""
        from magi_attention.mask import flex

        return flex.from_block_mask(block_mask, **options)

    def to_mask_mod(self, device: Any = "cpu") -> Any:
        """A ``mask_mod(b, h, q, k)`` for flex_attention: see `mask.flex.to_mask_mod`."""
        from magi_attention.mask import flex

        return flex.to_mask_mod(self, device)

    def to_block_mask(self, block_size: int | tuple[int, int] = 128, device: Any = "cpu") -> Any:
        """A ``BlockMask`` for flex_attention: see `mask.flex.to_block_mask`."""
        from magi_attention.mask import flex

        return flex.to_block_mask(self, block_size, device)

    def to_dense(self) -> NDArray[np.bool_]:
        """``[num_q, num_k]`` bool. For tests and small masks: its size is the square of the length."""
        dense: NDArray[np.bool_] = band_table.to_dense(self.bands, self.num_q, self.num_k) > 0
        return dense

    def coverage(self, num_rows: int, num_columns: int) -> NDArray[np.float64]:
        """``[num_rows, num_columns]`` float64: the attended share of each field of a grid laid over the mask.

        Computed from the rows' areas, so its cost does not grow with the square of the length.
        """
        q_edges = np.linspace(0, self.num_q, num_rows + 1).round().astype(np.int64)
        k_edges = np.linspace(0, self.num_k, num_columns + 1).round().astype(np.int64)
        pieces, _, row = band_table.split_q(self.bands, q_edges[:-1], q_edges[1:])
        pieces, piece, column = band_table.split_k(pieces, k_edges[:-1], k_edges[1:])
        cells = np.bincount(
            row[piece] * num_columns + column, weights=band_table.area(pieces), minlength=num_rows * num_columns
        )
        return cells.reshape(num_rows, num_columns) / np.maximum(np.outer(np.diff(q_edges), np.diff(k_edges)), 1)

    def to_string(self, max_rows: int = 32, max_columns: int = 64) -> str:
        """A drawing for a terminal, queries downwards and keys to the right; darker means more of the field is attended."""
        num_rows, num_columns = min(max_rows, max(self.num_q, 1)), min(max_columns, max(self.num_k, 1))
        share = self.coverage(num_rows, num_columns)
        # Any attended cell shows, and only a field that is attended whole is black.
        shade = np.where(share >= 1, 4, np.where(share > 0, 1 + np.minimum(share * 3, 2).astype(np.int64), 0))
        lines = ["".join(_SHADES[s] for s in row) for row in shade]
        title = (
            f"AttnMask: {self.num_q:,} queries x {self.num_k:,} keys, {len(self.bands):,} rows, "
            f"{self.area:,} cells ({1 - self.sparsity:.2%})"
        )
        edge = "─" * num_columns
        return "\n".join([title, f"┌{edge}┐", *(f"│{line}│" for line in lines), f"└{edge}┘"])

    def digest(self) -> bytes:
        """32 bytes that name this value, the same in every process."""
        lengths = np.array([self.num_q, self.num_k], np.int64)
        return hashlib.sha256(lengths.tobytes() + self.bands.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttnMask):
            return NotImplemented
        lengths_equal = (self.num_q, self.num_k) == (other.num_q, other.num_k)
        return lengths_equal and np.array_equal(self.bands, other.bands)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor, which makes the table read-only again.
        return AttnMask, (self.bands, self.num_q, self.num_k)

    def __hash__(self) -> int:
        return hash((self.num_q, self.num_k, self.bands.tobytes()))


def _as_pairs(ranges: Any, name: str) -> Ints:
    if hasattr(ranges, "to_naive_ranges"):
        ranges = ranges.to_naive_ranges()
    elif isinstance(ranges, Sequence):
        ranges = [r.to_naive_range() if hasattr(r, "to_naive_range") else tuple(r) for r in ranges]
    return as_pairs(ranges, name)


def _as_types(types: Any, num_slices: int) -> Ints:
    if isinstance(types, str) or not hasattr(types, "__len__"):
        return np.full(num_slices, _as_type(types))
    if hasattr(types, "dtype"):
        types = as_ints(types, "attn_mask_type").tolist()
    kinds = {kind: _as_type(kind) for kind in set(types)}
    return np.fromiter((kinds[kind] for kind in types), np.int64, len(types))


def _as_type(kind: Any) -> int:
    kind = AttnMaskType.from_int_type(int(kind)) if isinstance(kind, (int, np.integer)) else AttnMaskType(kind)
    return kind.to_int_type()


def _check_ranges(pairs: Ints, length: int, name: str) -> None:
    bad = np.flatnonzero((pairs[:, 0] < 0) | (pairs[:, 0] > pairs[:, 1]) | (pairs[:, 1] > length))
    if len(bad):
        start, end = pairs[bad[0]].tolist()
        raise ValueError(f"{name} {bad[0]} must satisfy 0 <= start <= end <= {length}, got [{start}, {end})")
