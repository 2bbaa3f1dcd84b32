"""Prints the digests of many random plans, one a line: what must be equal on every processor and under every numpy.

Needs numpy alone, and draws its masks with Python's own generator, whose numbers are the same everywhere.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    DPDispatchAlg,
    GreedyOverlapAlg,
    MinHeapDispatchAlg,
    OverlapConfig,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    UniformOverlapAlg,
)
from magi_attention.mask import AttnMask, causal, varlen, varlen_block_causal
from magi_attention.plan import AttnPlan, build_plan
from magi_attention.plan.joint import joint_layout
from magi_attention.plan.query_moves import RowBytes

NUM_PLANS = 100


def documents(rng: random.Random, total: int) -> list[int]:
    """Borders of documents of very different lengths; many masks have ties among chunks of short ones."""
    borders = [0]
    while borders[-1] < total:
        length = rng.choice([1, 17, 64, 256, 256, 256, 1000, 3000, total // 3]) + rng.randrange(3)
        borders.append(min(total, borders[-1] + length))
    return borders


def random_mask(rng: random.Random, total: int) -> AttnMask:
    kind = rng.choice(["documents", "documents", "blocks", "window", "causal", "rectangles"])
    if kind == "documents":
        return varlen(documents(rng, total), causal=rng.random() < 0.8)
    if kind == "blocks":
        return varlen_block_causal(documents(rng, total), rng.choice([64, 300]))
    if kind == "window":
        return varlen(documents(rng, total), window_size=(rng.randrange(1, 2000), 0))
    if kind == "causal":
        return causal(total)
    edges = sorted({0, total, *(rng.randrange(total) for _ in range(12))})
    q_ranges, k_ranges = [], []
    for begin, end in zip(edges, edges[1:], strict=False):
        first = rng.randrange(total)
        q_ranges.append([begin, end])
        k_ranges.append([first, rng.randrange(first, total) + 1])
    return AttnMask.from_slices(q_ranges, k_ranges, [rng.randrange(4) for _ in q_ranges], total, total)


def random_plan(seed: int) -> AttnPlan:
    """One plan; the seeds go through all dispatchers, ways to choose stages, nodes, moved queries and joint dispatches."""
    rng = random.Random(seed)
    algorithms: list[DispatchAlg] = [
        AffinityDispatchAlg(),
        AffinityDispatchAlg(),
        MinHeapDispatchAlg(),
        SequentialDispatchAlg(),
        SortedSequentialSelectAlg(),
        ToppHeapDispatchAlg(top_p=0.5),
        BSDispatchAlg(),
        DPDispatchAlg(),
    ]
    algorithm = algorithms[seed % len(algorithms)]
    num_ranks = 2 if isinstance(algorithm, DPDispatchAlg) else rng.choice([2, 4, 8, 12, 16])
    total = rng.randrange(4000, 40_000)
    chunk_size = -(-total // 10) if isinstance(algorithm, DPDispatchAlg) else rng.choice([None, 37, 64, 128, 512])
    overlap = rng.choice(
        [
            OverlapConfig(degree=1),
            OverlapConfig(degree=3, min_chunk_size=16),
            OverlapConfig(degree=3, min_chunk_size=16, alg=GreedyOverlapAlg()),
            OverlapConfig(mode=AttnOverlapMode.DYNAMIC, min_chunk_size=16, alg=UniformOverlapAlg()),
            OverlapConfig(mode=AttnOverlapMode.DYNAMIC, min_chunk_size=16, alg=GreedyOverlapAlg()),
        ]
    )
    dispatch_config = DispatchConfig(chunk_size=chunk_size, alg=algorithm, uneven_shard=rng.random() < 0.2)
    config = DistAttnConfig(dispatch_config, overlap)
    mask = random_mask(rng, total)
    layout = None
    if seed % 5 == 4:
        masks = [mask, random_mask(rng, total)]
        layout = joint_layout(masks, [1.0, rng.choice([0.3, 5.0])], num_ranks, config)
    moving = rng.choice([None, None, RowBytes.of(32, 8, 128), RowBytes.of(8, 8, 64)])
    # Queries do not move in plans that go by nodes.
    nodes = num_ranks // 2 if moving is None and rng.random() < 0.3 else None
    return build_plan(
        mask,
        num_ranks,
        config,
        q_layout=layout,
        moves_queries=moving,
        only_few_queries=rng.random() < 0.3,
        ranks_per_node=nodes,
    )


def digests(num_plans: int = NUM_PLANS) -> Iterator[str]:
    for seed in range(num_plans):
        yield random_plan(seed).digest().hex()


if __name__ == "__main__":
    sys.stdout.write("\n".join(digests()) + "\n")
