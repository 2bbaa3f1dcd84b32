"""When queries move instead of keys."""

from magi_attention.config import DispatchConfig, DistAttnConfig
from magi_attention.mask import AttnMask
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
