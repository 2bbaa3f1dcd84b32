"""One dispatch for several masks: a model whose layers attend differently, say one full layer to five windowed ones.

Every chunk has an area under each mask. The weighted sum decides what a step costs; but each layer waits for its own slowest
rank, so no single
mask may be far out of balance either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import DistAttnConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import Ints
from magi_attention.plan.dispatch import DispatchProblem, chunk_areas, dispatch
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.sharding import cuts_to_try

# Areas are weighted in integers; this many steps keep the ratio of weights.
_WEIGHT_STEPS = 1 << 10
# A dispatch made for the weighted sum is kept if no mask's own imbalance exceeds this, or what dealing with all masks in view reaches.
SINGLE_MASK_LIMIT = 1.15


def joint_layout(
    masks: Sequence[AttnMask],
    weights: Sequence[float],
    num_ranks: int,
    config: DistAttnConfig,
    *,
    pad_size: int | None = None,
    min_chunks_per_rank: int = 8,
) -> ShardLayout:
    """The layout of self-attention's rows under all of ``masks``, each ``weights`` times as frequent.

    The configured algorithm balances the weighted sum. Where that leaves a single mask too far out of balance, chunks are dealt with all
    masks in view instead (`deal_in_view_of_all`).

    Raises:
        ValueError: no masks, other lengths, or weights that are not positive, one for each.
    """
    _check(masks, weights)
    scale = np.maximum(np.round(np.asarray(weights) / max(weights) * _WEIGHT_STEPS).astype(np.int64), 1)
    bands = np.concatenate([mask.bands for mask in masks])

    def areas_by_mask(edges: Ints) -> Ints:  # [num_masks, num_chunks]
        return np.stack([chunk_areas(mask.bands, edges) for mask in masks])

    def weighted(edges: Ints) -> Ints:
        total: Ints = (scale[:, None] * areas_by_mask(edges)).sum(axis=0)
        return total

    for cut in cuts_to_try(masks[0].num_q, num_ranks, config.dispatch_config, min_chunks_per_rank, pad_size, weighted):
        problem = DispatchProblem(bands, cut.edges, cut.edges, True, weighted(cut.edges), num_ranks)
        if problem.can_be_even:
            break
    areas = areas_by_mask(cut.edges)
    by_sum = dispatch(problem, config.dispatch_config)
    in_view = deal_in_view_of_all(areas, num_ranks, problem.max_chunks)
    limits = np.maximum(imbalances(areas, in_view, num_ranks), SINGLE_MASK_LIMIT)
    return cut.layout(by_sum if (imbalances(areas, by_sum, num_ranks) <= limits).all() else in_view)


def _check(masks: Sequence[AttnMask], weights: Sequence[float]) -> None:
    if not masks or len(masks) != len(weights) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"a joint dispatch needs masks and one positive weight for each, got {len(masks)} and {list(weights)}"
        )
    lengths = {(mask.num_q, mask.num_k) for mask in masks}
    if len(lengths) > 1 or masks[0].num_q != masks[0].num_k:
        raise ValueError(
            f"masks of one dispatch must be of the same tokens, queries and keys alike, got lengths {sorted(lengths)}"
        )


def imbalances(areas: Ints, owner: Ints, num_ranks: int) -> NDArray[np.float64]:
    """``[num_masks]``: largest area of a rank over the mean, under each mask; 1 for a mask that attends nothing."""
    load = np.zeros((len(areas), num_ranks), np.int64)
    np.add.at(load.T, owner, areas.T)
    total = load.sum(axis=1)  # of integers: exact in any order
    return np.where(total > 0, load.max(axis=1) * num_ranks / np.maximum(total, 1), 1.0)


def deal_in_view_of_all(areas: Ints, num_ranks: int, max_chunks: int) -> Ints:
    """``[num_chunks]`` owners: the chunk with the largest share of any mask first, to the rank whose largest share then stays smallest."""
    share = areas / np.maximum(areas.sum(axis=1, keepdims=True), 1)  # [num_masks, num_chunks]
    load = np.zeros((num_ranks, len(areas)))
    count = np.zeros(num_ranks, np.int64)
    owner = np.empty(areas.shape[1], np.int64)
    for chunk in np.argsort(-share.max(axis=0), kind="stable").tolist():
        after = (load + share[:, chunk]).max(axis=1)
        rank = int(np.argmin(np.where(count < max_chunks, after, np.inf)))
        owner[chunk] = rank
        load[rank] += share[:, chunk]
        count[rank] += 1
    return owner
