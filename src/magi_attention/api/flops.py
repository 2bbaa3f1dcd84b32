"""What `torch.utils.flop_counter` counts for distributed attention: the cells that this rank computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import magi_attention.api.ops  # noqa: F401 - makes the operators that are registered here
from magi_attention.functional.flops import register_flops
from magi_attention.runtime import cache


def _cells_of_rank(given: Mapping[str, Any]) -> int:
    session = cache.get_session(cache.key_behind(given["handle"]))
    return int(session.plan.areas[session.key.cp_rank])


register_flops("distributed_attn", _cells_of_rank)
