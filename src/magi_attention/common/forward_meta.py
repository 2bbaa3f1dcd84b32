"""What a forward pass returns beside its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # masks and plans are made and drawn without torch, which takes seconds to import
    from torch import Tensor


@dataclass
class AttnForwardMeta:
    """Statistics of the softmax.

    ``lse``: ``[num_tokens_q, num_heads_q]`` float32 (float64 for float64 inputs), natural log of the softmax's denominator;
    ``-inf`` where a query attends nothing (the sink's, with one). It is differentiable, so a z-loss works; a kept lse therefore holds the
    graph and the tensors saved for the backward: keep ``lse.detach()`` where it is only logged. ``max_logits``: ``[num_heads_q]`` of lse's
    dtype, or None where it was not asked for: the largest scaled logit over attended cells, before softcap; not differentiable.
    """

    lse: Tensor | None
    max_logits: Tensor | None = None
