"""`build_plan`: from a mask to its plan."""

from __future__ import annotations

from functools import cache

import numpy as np

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.config import DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.mask.bands import Ints
from magi_attention.plan.cost import CostModel, Heads, cost_of
from magi_attention.plan.demand import num_rows, remote_transfers
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.plan import AttnPlan, areas_of
from magi_attention.plan.predicted import Prediction, fastest, not_slower_than, prediction, prediction_of_one_stage
from magi_attention.plan.query_moves import RowBytes, choose_moves, queries_are_few
from magi_attention.plan.sharding import make_layouts
from magi_attention.plan.stages import deal
from magi_attention.plan.workload import Dealing


def build_plan(
    mask: AttnMask,
    num_ranks: int,
    config: DistAttnConfig | None = None,
    *,
    is_same_source: bool = True,
    is_q_permutable: bool = True,
    is_k_permutable: bool = True,
    pad_size: int | None = None,
    min_chunks_per_rank: int = 8,
    q_layout: ShardLayout | None = None,
    k_layout: ShardLayout | None = None,
    heads: Heads | None = None,
    moves_queries: RowBytes | None = None,
    only_few_queries: bool = False,
    ranks_per_node: int | None = None,
) -> AttnPlan:
    """Plan a mask over ``num_ranks`` ranks. A pure function: same arguments, same plan, bit for bit, in every process.

    Args:
        mask: what is attended; its lengths are unpadded.
        config: chunks, dispatch algorithm and stages; left out, the defaults.
        is_same_source: keys are made of the same rows as queries, so both are laid out alike.
        is_q_permutable, is_k_permutable: a side that is not is sharded in order, or as the layout given for it.
        pad_size: padding rows of q, as `DispatchConfig` and the number of ranks require; None or 0 computes them.
        min_chunks_per_rank: how many chunks a rank gets at least where the config names no chunk size.
        q_layout, k_layout: layouts already decided (a second mask over the same dispatch); left out, decided here.
        heads: for which the step is predicted, by which layouts and stages are chosen, where the config gives no costs; left out, a
            Llama-like model's.
        moves_queries: given, queries move instead of keys where that makes fewer of these bytes.
        only_few_queries: consider that only for masks in which it is plain: sending all queries that attend anything to all ranks would
            move fewer bytes than the keys do. This costs no planning time elsewhere.
        ranks_per_node: given, a key row that several ranks of a node need crosses to that node once (see ``plan.hierarchy``).

    Raises:
        ValueError: lengths, flags, padding or layouts that do not fit together, or an algorithm that cannot serve.
    """
    config = config or DistAttnConfig()
    if ranks_per_node is not None and (ranks_per_node < 1 or num_ranks % ranks_per_node):
        raise ValueError(f"ranks_per_node must divide the number of ranks, {num_ranks}, got {ranks_per_node}")
    heads = heads or Heads()
    cost = cost_of(config.overlap_config, heads)
    layouts = make_layouts(
        mask,
        num_ranks,
        config.dispatch_config,
        is_same_source=is_same_source,
        is_q_permutable=is_q_permutable,
        is_k_permutable=is_k_permutable,
        pad_size=pad_size,
        min_chunks_per_rank=min_chunks_per_rank,
        q_layout=q_layout,
        k_layout=k_layout,
    )

    @cache
    def complete(q_and_k: tuple[ShardLayout, ShardLayout]) -> AttnPlan:
        asks = moves_queries, only_few_queries
        plan, undealt = _plan_over(mask, *q_and_k, config.overlap_config, cost, asks, ranks_per_node)
        if plan.moved is None or config.overlap_config.mode is AttnOverlapMode.STATIC or not len(undealt):
            return plan
        return not_slower_than(plan, Dealing(undealt, 1), heads, cost)

    in_one_stage = _comes_in_one_stage(config.overlap_config) and ranks_per_node is None and cost.ranks_per_node is None

    def predict(q_and_k: tuple[ShardLayout, ShardLayout]) -> Prediction:
        if in_one_stage:
            quick = prediction_of_one_stage(mask, *q_and_k, cost)
            if moves_queries is None or (
                only_few_queries and not queries_are_few(mask.bands, quick.rows, num_ranks, moves_queries)
            ):
                return quick
        return prediction(complete(q_and_k), heads, cost)

    return complete(fastest(layouts, predict, cost))


def _comes_in_one_stage(config: OverlapConfig) -> bool:
    return not config.enable or (config.mode is AttnOverlapMode.STATIC and config.degree == 1)


def _plan_over(
    mask: AttnMask,
    q_layout: ShardLayout,
    k_layout: ShardLayout,
    config: OverlapConfig,
    cost: CostModel,
    asks: tuple[RowBytes | None, bool],
    ranks_per_node: int | None,
) -> tuple[AttnPlan, Ints]:
    """The plan of a mask whose rows are laid out, and the transfers of its keys before they were dealt to stages.

    ``asks``: ``moves_queries`` and ``only_few_queries`` of `build_plan`.
    """
    moves_queries, only_few_queries = asks
    moved, guests = None, np.empty((0, 6), np.int64)
    transfers, areas = remote_transfers(mask.bands, q_layout, k_layout), areas_of(mask, q_layout)
    if moves_queries is not None and not (
        only_few_queries and not queries_are_few(mask.bands, num_rows(transfers), q_layout.num_ranks, moves_queries)
    ):
        moves = choose_moves(mask.bands, q_layout, k_layout, transfers, areas, moves_queries)
        if moves is not None:
            moved, guests, transfers = moves.moved, moves.guests, moves.transfers
    forward, backward = deal(transfers, mask.bands, q_layout, k_layout, areas, config, cost, ranks_per_node)
    return AttnPlan(mask, q_layout, k_layout, forward, backward, guests, moved, ranks_per_node), transfers
