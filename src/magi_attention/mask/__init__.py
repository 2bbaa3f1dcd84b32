"""What is attended: the band table and the mask value."""

from magi_attention.mask.attn_mask import AttnMask

__all__ = ["AttnMask"]
