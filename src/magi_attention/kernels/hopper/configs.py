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
    """``block`` queries a step, ``stages`` of them in shared memory; ``registers`` of a thread of a consumer."""

    block: int
    stages: int
    registers: int = 240


FORWARD_TILES = {64: ForwardTiles(128, 2, False), 128: ForwardTiles(128, 2, True)}
BACKWARD_TILES = {64: BackwardTiles(64, 2), 128: BackwardTiles(64, 2)}
HEAD_DIMS = tuple(FORWARD_TILES)
