"""The chunk size that is chosen where none is given."""

from __future__ import annotations

import numpy as np
import pytest

from magi_attention.config import AffinityDispatchAlg, DispatchConfig, DistAttnConfig, MinHeapDispatchAlg
from magi_attention.mask import AttnMask, causal, varlen
from magi_attention.plan import build_plan
from magi_attention.plan.chunk_size import FINEST_CHUNK, chunk_sizes, fine_enough
from magi_attention.plan.dispatch import chunk_areas
from magi_attention.plan.layout import default_chunk_size

# One document of a third of all tokens among many short ones: its last chunk outweighs a rank's mean area.
LOPSIDED = [0, *range(500, 80_000, 500), 80_000, 120_000]


def chosen(mask: AttnMask, num_ranks: int, **settings: object) -> int:
    return build_plan(mask, num_ranks, **settings).q_layout.chunk_size  # type: ignore[arg-type]


def test_where_chunks_are_even_the_default_stays() -> None:
    assert chosen(causal(65_536), 8) == default_chunk_size(65_536, 8, 8)
    assert chosen(varlen(LOPSIDED, window_size=(100, 0)), 16) == default_chunk_size(120_000, 16, 8)


def test_where_one_chunk_outweighs_a_rank_chunks_are_cut() -> None:
    mask, coarse = varlen(LOPSIDED, causal=True), default_chunk_size(120_000, 16, 8)
    areas = chunk_areas(mask.bands, np.minimum(np.arange(8 * 16 + 1) * coarse, 120_000))
    assert not fine_enough(areas, 16)
    plan = build_plan(mask, 16)
    assert FINEST_CHUNK <= plan.q_layout.chunk_size < coarse
    assert plan.imbalance <= 1.05
    forced = build_plan(mask, 16, DistAttnConfig(DispatchConfig(chunk_size=coarse)))
    assert plan.report().step < forced.report().step


def test_sizes_fall_by_halves_down_to_the_finest() -> None:
    sizes = list(chunk_sizes(1 << 20, 64, 8))
    assert sizes == [2048, 1024, 512, 256, 128]
    assert list(chunk_sizes(1000, 4, 8)) == [32], "a short sequence has one size, however small"


def test_a_size_that_is_given_is_used_as_it_is() -> None:
    mask = varlen(LOPSIDED, causal=True)
    for size in (64, 300, 4000):
        config = DistAttnConfig(DispatchConfig(chunk_size=size))
        assert build_plan(mask, 16, config).q_layout.chunk_size == size


def test_other_dispatchers_take_the_default() -> None:
    mask = varlen(LOPSIDED, causal=True)
    config = DistAttnConfig(DispatchConfig(alg=MinHeapDispatchAlg()))
    assert build_plan(mask, 16, config).q_layout.chunk_size == default_chunk_size(120_000, 16, 8)


def test_padding_that_is_given_decides_among_sizes() -> None:
    mask, num_ranks = varlen(LOPSIDED, causal=True), 16
    free = build_plan(mask, num_ranks)
    again = build_plan(mask, num_ranks, pad_size=free.q_layout.pad_size or None)
    assert again.q_layout.chunk_size == free.q_layout.chunk_size
    with pytest.raises(ValueError, match="pad_size must be"):
        build_plan(mask, num_ranks, pad_size=1)


def test_uneven_shards_need_no_padding_with_finer_chunks() -> None:
    mask = varlen([*LOPSIDED[:-1], 119_999], causal=True)
    plan = build_plan(mask, 16, DistAttnConfig(DispatchConfig(uneven_shard=True, alg=AffinityDispatchAlg())))
    assert plan.q_layout.pad_size == 0
    assert plan.q_layout.chunk_size < default_chunk_size(119_999, 16, 8)
