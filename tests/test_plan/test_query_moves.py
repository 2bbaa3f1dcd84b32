"""When queries move instead of keys."""

import numpy as np
import pytest

from magi_attention.config import DispatchConfig, DistAttnConfig, SequentialDispatchAlg
from magi_attention.mask import AttnMask, varlen
from magi_attention.plan import build_plan
from magi_attention.plan.query_moves import RowBytes
from magi_attention.testing.plan_check import check_cells, check_deliveries

ROW_BYTES = RowBytes.of(num_heads_q=4, num_heads_kv=1, head_dim=64)
CONFIG = DistAttnConfig(dispatch_config=DispatchConfig(chunk_size=4))


def test_a_short_suffix_moves_without_being_asked() -> None:
    suffix = AttnMask.from_slices([[248, 256]], [[0, 256]], "causal")
    keys = build_plan(suffix, 4, CONFIG)
    queries = build_plan(suffix, 4, CONFIG, moves_queries=ROW_BYTES, only_few_queries=True)
    assert queries.received_rows.sum() == 0
    assert queries.received_queries.sum() == 8 * 3
    assert queries.received_queries.sum() * ROW_BYTES.query < 0.4 * keys.received_rows.sum() * ROW_BYTES.key
    assert queries.imbalance < 1.1 < keys.imbalance
    check_cells(queries)
    check_deliveries(queries)


def test_where_it_is_not_plain_keys_move() -> None:
    causal = AttnMask.from_slices([[0, 256]], [[0, 256]], "causal")
    keys = build_plan(causal, 4, CONFIG)
    unasked = build_plan(causal, 4, CONFIG, moves_queries=ROW_BYTES, only_few_queries=True)
    assert unasked.digest() == keys.digest()


@pytest.mark.parametrize("seed", range(20))
def test_never_more_bytes_than_without(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.unique(np.concatenate([[0, 300], rng.integers(1, 300, 5)]))
    window = (int(rng.integers(0, 60)), int(rng.integers(0, 3))) if seed % 2 else None
    mask = varlen(edges, window_size=window) if window else varlen(edges, causal=seed % 4 == 0)
    config = DistAttnConfig(DispatchConfig(chunk_size=int(rng.integers(1, 9)), alg=SequentialDispatchAlg()))
    row_bytes = RowBytes(key=int(rng.integers(1, 9)), query=int(rng.integers(1, 5)))
    num_ranks = int(rng.integers(2, 13))
    keys, queries = (build_plan(mask, num_ranks, config, moves_queries=moves) for moves in (None, row_bytes))
    moved = int(queries.received_rows.sum()) * row_bytes.key + int(queries.received_queries.sum()) * row_bytes.query
    without = int(keys.received_rows.sum()) * row_bytes.key
    assert moved < without if queries.moved is not None else moved == without
    check_cells(queries)
    check_deliveries(queries)


def test_keys_move_where_a_chunk_asks_for_few() -> None:
    # Rank 0 holds the keys. Of rank 1, four queries that want all eight go there, and the one key that four others want comes. Rank 2 has
    # as many queries as it wants keys: nothing is saved, keys move.
    mask = AttnMask.from_slices([[8, 12], [12, 16], [16, 24]], [[0, 8], [7, 8], [0, 8]], "full", 24, 24)
    config = DistAttnConfig(DispatchConfig(chunk_size=4, alg=SequentialDispatchAlg()))
    plan = build_plan(mask, 3, config, moves_queries=RowBytes(key=2, query=2))
    assert plan.received_queries.tolist() == [4, 0, 0]
    assert plan.received_rows.tolist() == [0, 1, 8]
    check_cells(plan)
    check_deliveries(plan)
