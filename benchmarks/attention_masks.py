"""The masks that the CPU benchmark measures, at any length, each also as the rule that FlexAttention wants.

Documents scale with the sequence, so the share of the square that is attended stays as it is, save for window and short documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magi_attention.mask import AttnMask, varlen

# Of a sequence of 4,096 tokens.
DOCUMENTS = (1024, 128, 768, 256, 512, 896, 64, 448)
# Documents of the block-causal mask, in sixteenths of the sequence.
BLOCK_DOCUMENTS = (10, 6)
BLOCK, WINDOW, SHORT = 256, 512, 32
# Every length is a multiple of this, so that documents scale to whole tokens.
UNIT = 64

FlexRule = Callable[[Any, Any, Any, Any], Tensor]


@dataclass(frozen=True)
class BenchmarkMask:
    """``flex_rule``: FlexAttention's ``mask_mod(batch, head, query, key)`` of the same cells. ``is_causal``: plain causal or full, which
    torch's fused attention knows; None where it needs a dense mask."""

    mask: AttnMask
    flex_rule: FlexRule
    is_causal: bool | None = None


def edges_of(lengths: tuple[int, ...], total: int) -> list[int]:
    """Where documents begin, and the end, with ``lengths`` scaled to fill ``total`` tokens."""
    return [0, *(np.cumsum(lengths) * total // sum(lengths)).tolist()]


def document_numbers(edges: list[int]) -> Tensor:
    """``[total]`` int32: the document of every token."""
    return torch.repeat_interleave(torch.arange(len(edges) - 1, dtype=torch.int32), torch.tensor(edges).diff())


def make_masks(total: int) -> dict[str, BenchmarkMask]:
    """Masks by name, over ``total`` tokens. ValueError: ``total`` is not a positive multiple of 64."""
    if total <= 0 or total % UNIT:
        raise ValueError(
            f"the number of tokens must be a positive multiple of {UNIT}, got {total}: give another --tokens"
        )
    edges = edges_of(DOCUMENTS, total)
    block_edges = edges_of(BLOCK_DOCUMENTS, total)
    # Below 4,096 tokens blocks and window shrink too, or nothing would be left of what they cut.
    block, window = min(BLOCK, total // 16), min(WINDOW, total // 8)
    short_edges = list(range(0, total + 1, SHORT))
    return {
        "full": BenchmarkMask(AttnMask.full(total), lambda b, h, i, j: i >= 0, is_causal=False),
        "causal": BenchmarkMask(AttnMask.causal(total), lambda b, h, i, j: i >= j, is_causal=True),
        "varlen": BenchmarkMask(varlen(edges, causal=True), _document_rule(edges, 1)),
        "window": BenchmarkMask(
            AttnMask.sliding_window(total, (window - 1, 0)), lambda b, h, i, j: (i >= j) & (i - j < window)
        ),
        "block-causal": BenchmarkMask(
            AttnMask.varlen_block_causal(block_edges, block), _document_rule(block_edges, block)
        ),
        "short": BenchmarkMask(varlen(short_edges, causal=True), _document_rule(short_edges, 1)),
    }


def _document_rule(edges: list[int], block: int) -> FlexRule:
    """Causal by blocks inside documents that begin at multiples of ``block``."""
    documents = document_numbers(edges)
    return lambda b, h, i, j: (documents[i] == documents[j]) & (i // block >= j // block)
