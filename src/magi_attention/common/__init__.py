"""Values that every layer speaks of: ranges of tokens, names of choices, what a forward pass reports."""

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.range import AttnRange, RangeError
from magi_attention.common.ranges import AttnRanges

__all__ = ["AttnForwardMeta", "AttnRange", "AttnRanges", "RangeError"]
