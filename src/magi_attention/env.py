"""The one module that reads the environment: every variable, its default, and what it may be.

Each function reads at the time of the call and hands out a value; nothing else in the package looks at `os.environ`.
"""

from __future__ import annotations

import os

_PREFIX = "MAGI_ATTENTION_"
_DSINK_OPS = ("none", "sum", "avg")


def _read(name: str) -> str:
    """What a variable is set to, in lower case; "" where it is not set, or set to nothing."""
    return os.environ.get(_PREFIX + name, "").strip().lower()


def _choice(name: str, choices: tuple[str, ...]) -> str:
    """One of ``choices``; the first where the variable is not set."""
    value = _read(name) or choices[0]
    if value not in choices:
        raise ValueError(f"{_PREFIX}{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _flag(name: str) -> bool:
    value = _read(name)
    if value not in ("", "0", "1", "true", "false"):
        raise ValueError(f"{_PREFIX}{name} must be 0 or 1, got {value!r}")
    return value in ("1", "true")


def _count(name: str, default: int, least: int) -> int:
    value = _read(name)
    try:
        count = int(value) if value else default
    except ValueError:
        count = least - 1
    if count < least:
        raise ValueError(f"{_PREFIX}{name} must be an int of at least {least}, got {value!r}")
    return count


def sanity_check() -> bool:
    """SANITY_CHECK (0): masks are checked for cells listed twice, and ranks for having been given the same plan."""
    return _flag("SANITY_CHECK")


def sdpa_backend() -> bool:
    """SDPA_BACKEND (0): the dense reference computes, in float32 or float64. For debugging."""
    return _flag("SDPA_BACKEND")


def deterministic_mode() -> bool:
    """DETERMINISTIC_MODE (0): same inputs, same bits."""
    return _flag("DETERMINISTIC_MODE")


def forward_high_precision_reduce() -> bool:
    """FORWARD_HIGH_PRECISION_REDUCE (0): partial outputs travel in float32 rather than the inputs' dtype."""
    return _flag("FORWARD_HIGH_PRECISION_REDUCE")


def backward_high_precision_reduce() -> bool:
    """BACKWARD_HIGH_PRECISION_REDUCE (0): partial gradients travel in float32 rather than the inputs' dtype."""
    return _flag("BACKWARD_HIGH_PRECISION_REDUCE")


def dsink_all_reduce_op() -> str:
    """DSINK_ALL_REDUCE_OP (none): what is done over ranks with their shares of the sink's gradient: none, sum or avg."""
    return _choice("DSINK_ALL_REDUCE_OP", _DSINK_OPS)


def qo_comm() -> bool | None:
    """QO_COMM (by the mask): plans may move queries and outputs instead of keys: 1 wherever that makes fewer bytes, 0 never; left
    out (None), only for masks of few queries over many keys, where it is plain."""
    return _flag("QO_COMM") if _read("QO_COMM") else None


def hierarchical_comm() -> bool:
    """HIERARCHICAL_COMM (0): on a 2-D mesh, a row crosses between nodes once, whatever the number of ranks there that need it."""
    return _flag("HIERARCHICAL_COMM")


def dist_attn_runtime_dict_size() -> int:
    """DIST_ATTN_RUNTIME_DICT_SIZE (1000): plans kept for each group."""
    return _count("DIST_ATTN_RUNTIME_DICT_SIZE", 1000, 1)


def ffa_forward_sm_margin() -> int:
    """FFA_FORWARD_SM_MARGIN (0): accepted; the kernels here leave no multiprocessors free."""
    return _count("FFA_FORWARD_SM_MARGIN", 0, 0)


def ffa_backward_sm_margin() -> int:
    """FFA_BACKWARD_SM_MARGIN (0): as the forward's."""
    return _count("FFA_BACKWARD_SM_MARGIN", 0, 0)


def min_chunks_per_rank() -> int:
    """MIN_CHUNKS_PER_RANK (8): chunks a rank gets at least where no chunk size is given."""
    return _count("MIN_CHUNKS_PER_RANK", 8, 1)


def backend() -> str:
    """BACKEND (auto): which kernel computes: auto, reference, tiled, cpu, triton, hopper. Checked where kernels are picked."""
    return _read("BACKEND") or "auto"
