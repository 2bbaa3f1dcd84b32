"""Rows between ranks, over any process group: gloo and NCCL alike, or none."""

from magi_attention.comm.agree import all_reduce_max, assert_same_plan, dsink_all_reduce, tell_refusal
from magi_attention.comm.exchange_rows import group_cast, group_reduce, group_reduce_lse
from magi_attention.comm.failure import CommTimeoutError
from magi_attention.comm.pending import Pending
from magi_attention.comm.shards import gather_rows, reduce_scatter_rows
from magi_attention.env import dsink_all_reduce_op

__all__ = [
    "CommTimeoutError",
    "Pending",
    "all_reduce_max",
    "assert_same_plan",
    "dsink_all_reduce",
    "dsink_all_reduce_op",
    "gather_rows",
    "group_cast",
    "group_reduce",
    "group_reduce_lse",
    "reduce_scatter_rows",
    "tell_refusal",
]
