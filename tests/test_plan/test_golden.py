"""Plans as text, kept: a change of the planner shows as a diff that a person reads. `test_same_everywhere` holds more of them, as digests.

After a change that is meant: ``python tests/test_plan/test_golden.py`` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from magi_attention.config import (
    AffinityDispatchAlg,
    BSDispatchAlg,
    DispatchConfig,
    DistAttnConfig,
    MinHeapDispatchAlg,
    OverlapConfig,
)
from magi_attention.mask import causal, varlen, varlen_block_causal
from magi_attention.plan import AttnPlan, build_plan

FOLDER = Path(__file__).parent / "golden"


def _plan(name: str) -> AttnPlan:
    documents = [0, 5000, 5300, 9000, 9001, 16384]
    if name == "documents_affinity":
        return build_plan(varlen(documents, causal=True), 8, _config(AffinityDispatchAlg(), 128))
    if name == "documents_min_heap":
        return build_plan(varlen(documents, causal=True), 8, _config(MinHeapDispatchAlg(), 128))
    if name == "causal_two_stages":
        return build_plan(causal(4096), 4, _config(AffinityDispatchAlg(), 128, degree=2))
    if name == "blocks_on_two_nodes":
        return build_plan(varlen_block_causal(documents, 512), 4, _config(BSDispatchAlg(), 256), ranks_per_node=2)
    assert name == "window_padded"
    return build_plan(varlen([0, 1000], window_size=(100, 0)), 3, _config(AffinityDispatchAlg(), 50))


NAMES = ("documents_affinity", "documents_min_heap", "causal_two_stages", "blocks_on_two_nodes", "window_padded")


def _config(
    alg: AffinityDispatchAlg | MinHeapDispatchAlg | BSDispatchAlg, chunk_size: int, degree: int = 1
) -> DistAttnConfig:
    return DistAttnConfig(DispatchConfig(chunk_size=chunk_size, alg=alg), OverlapConfig(degree=degree))


@pytest.mark.parametrize("name", NAMES)
def test_plan_is_the_one_kept(name: str) -> None:
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert _plan(name).describe() + "\n" == kept


def test_every_kept_plan_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(NAMES)


if __name__ == "__main__":
    from plan_digests import digests

    (FOLDER / "random_plans.digests").write_text("\n".join(digests()) + "\n", encoding="utf-8")
    for each in NAMES:
        (FOLDER / f"{each}.txt").write_text(_plan(each).describe() + "\n", encoding="utf-8")
