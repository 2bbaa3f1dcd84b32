"""Who computes what, who sends what to whom, and when: plain numbers, no tensors, no process group."""

from magi_attention.plan.build import build_plan
from magi_attention.plan.exchange import Exchange
from magi_attention.plan.layout import ShardLayout
from magi_attention.plan.plan import AttnPlan, RankPlan, StagePlan

__all__ = ["AttnPlan", "Exchange", "RankPlan", "ShardLayout", "StagePlan", "build_plan"]
