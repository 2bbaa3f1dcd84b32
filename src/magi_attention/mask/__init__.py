"""What is attended: the band table, the mask value, and how masks are built, combined and converted."""

from magi_attention.mask.attn_mask import AttnMask
from magi_attention.mask.builders import (
    block_causal,
    causal,
    chunked_causal,
    cross_attention,
    dilated_blocks,
    full,
    multimodal,
    prefix_lm,
    shared_prefix,
    sliding_window,
    strided_blocks,
    varlen,
    varlen_block_causal,
    varlen_prefix_lm,
)
from magi_attention.mask.combine import attends_same, concat, intersection, restrict, shift, transpose, union
from magi_attention.mask.simplify import simplify

__all__ = [
    "AttnMask",
    "attends_same",
    "block_causal",
    "causal",
    "chunked_causal",
    "concat",
    "cross_attention",
    "dilated_blocks",
    "full",
    "intersection",
    "multimodal",
    "prefix_lm",
    "restrict",
    "shared_prefix",
    "shift",
    "simplify",
    "sliding_window",
    "strided_blocks",
    "transpose",
    "union",
    "varlen",
    "varlen_block_causal",
    "varlen_prefix_lm",
]
