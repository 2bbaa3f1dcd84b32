"""Tile sizes of the Hopper kernels by head dim: a static table, so that nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

# Queries of a consumer warpgroup: what one wgmma takes.
CONSUMER_ROWS = 64
# The kernels are written for two consumers, so that one's softmax runs under the other's products.
NUM_CONSUMERS = 2


@dataclass(frozen=True)
class ForwardTiles:
    """``block`` keys a step, ``stages`` of them in shared memory; with ``turns`` the consumers issue products in turn.

    ``registers`` of a thread of a consumer.
    """

    block: int
    stages: int
    turns: bool
    registers: int = 240


@dataclass(frozen=True)
class BackwardTiles:
    """``block`` queries a step, ``stages`` of them in shared memory; ``registers`` of a thread of a consumer.

    ``in_step``: whether causal masks may be walked as `walks` draws. With heads of 64 columns, half as many bytes, it was slower.
    """

    block: int
    stages: int
    in_step: bool
    registers: int = 240

    def dq_columns(self, head_dim: int) -> int:
        """Columns of dq that a consumer computes: half of them for all queries of a block of 64, or all for half of a block of 128."""
        return head_dim // 2 if self.block == CONSUMER_ROWS else head_dim


FORWARD_TILES = {64: ForwardTiles(128, 2, False), 128: ForwardTiles(128, 2, True)}
BACKWARD_TILES = {64: BackwardTiles(64, 2, False), 128: BackwardTiles(64, 2, True)}
HEAD_DIMS = tuple(FORWARD_TILES)
# Bytes a thread that the compiler keeps in memory, outside of the innermost loops: (kernel, head dim, case); all others keep none there.
MOST_SPILLED = {
    ("forward", 128, "merge"): 24,
    ("backward", 128, "plain"): 24,
    ("backward", 128, "merge"): 24,
    ("backward", 128, "in step"): 24,
}
