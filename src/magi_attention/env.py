"""The one module that reads variables of the environment: each one, its default, and what it may be.

Each function reads at the time of the call and returns a value. Two other files look at `os.environ`, and read no setting of the package:
`kernels/cpu/build.py` asks where the system keeps caches (XDG_CACHE_HOME), and `testing/dist.py` passes the caller's environment on to
the ranks that it starts.
"""

from __future__ import annotations

import difflib
import logging
import os
import warnings

_PREFIX = "MAGI_ATTENTION_"
_DSINK_OPS = ("none", "sum", "avg")
# What MagiAttention calls its kernels, and which of ours serves for each.
_KERNELS = {"ffa": "auto", "sdpa": "reference", "sdpa_ol": "tiled"}
_PRECISIONS = ("", "bf16", "fp16", "fp32", "fp64")
_LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
# Every variable that a function here reads, without the prefix; any other name with the prefix is a mistake.
VARIABLES = (
    "SANITY_CHECK",
    "SDPA_BACKEND",
    "DETERMINISTIC_MODE",
    "FORWARD_HIGH_PRECISION_REDUCE",
    "BACKWARD_HIGH_PRECISION_REDUCE",
    "DSINK_ALL_REDUCE_OP",
    "QO_COMM",
    "HIERARCHICAL_COMM",
    "DIST_ATTN_RUNTIME_DICT_SIZE",
    "FFA_FORWARD_SM_MARGIN",
    "FFA_BACKWARD_SM_MARGIN",
    "MIN_CHUNKS_PER_RANK",
    "KERNEL_BACKEND",
    "PRECISION",
    "LOG_LEVEL",
    "BACKEND",
)
# As the system stores them; on Windows, where it stores text, they are looked up the usual way.
_KEYS = {name: os.fsencode(_PREFIX + name) for name in VARIABLES} if os.name == "posix" else {}
_is_checked = False


def _read(name: str) -> str:
    """What a variable is set to, in lower case; "" where it is not set, or set to nothing."""
    if not _is_checked:
        _warn_of_unknown_names()
    return _value(name)


def _value(name: str) -> str:
    # A call of attention reads several variables. `os.environ` encodes and decodes in each look-up; the dict of bytes
    # under it, where there is one (CPython on POSIX), is read at once.
    stored = getattr(os.environ, "_data", None)
    if stored is None or name not in _KEYS:
        return os.environ.get(_PREFIX + name, "").strip().lower()
    value = stored.get(_KEYS[name])
    return "" if value is None else os.fsdecode(value).strip().lower()


def _warn_of_unknown_names() -> None:
    """One warning a process for each variable with the prefix that nothing reads."""
    global _is_checked
    _is_checked = True
    for variable in sorted(os.environ):
        name = variable.removeprefix(_PREFIX)
        if name == variable or name in VARIABLES:
            continue
        closest = difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.0)[0]
        warnings.warn(
            f"the environment sets {variable}, which nothing reads; the closest variable that is read is {_PREFIX}{closest}. Unset it, or "
            "correct its name",
            UserWarning,
            stacklevel=4,
        )


def _choice(name: str, choices: tuple[str, ...]) -> str:
    """One of ``choices``; the first where the variable is not set."""
    value = _read(name) or choices[0]
    if value not in choices:
        raise ValueError(f"{_PREFIX}{name} must be one of {', '.join(filter(None, choices))}, got {value!r}")
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
    """SDPA_BACKEND (0): the dense reference computes, in float32 or float64, unless BACKEND or KERNEL_BACKEND is set. For debugging."""
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
    """QO_COMM (by the mask): whether plans move queries and outputs instead of keys. 1: wherever that saves bytes. 0: never. Unset
    (None): only for masks with few queries over many keys."""
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


def kernel_backend() -> str | None:
    """KERNEL_BACKEND (unset): MagiAttention's names of kernels: ffa is BACKEND's auto, sdpa its reference, sdpa_ol its tiled; fa4 is
    refused. BACKEND wins over it, and it wins over SDPA_BACKEND."""
    value = _read("KERNEL_BACKEND")
    if value == "fa4":
        raise ValueError(
            f"{_PREFIX}KERNEL_BACKEND is fa4, a kernel that is not in this package; set it to ffa, which takes the fastest kernel here, "
            "or unset it"
        )
    if value and value not in _KERNELS:
        raise ValueError(f"{_PREFIX}KERNEL_BACKEND must be one of {', '.join(_KERNELS)}, got {value!r}")
    return _KERNELS[value] if value else None


def backend() -> str:
    """BACKEND (auto): which kernel computes: auto, reference, tiled, cpu, triton, hopper. Unset, KERNEL_BACKEND and then SDPA_BACKEND
    decide. Checked where kernels are picked."""
    return _read("BACKEND") or kernel_backend() or ("reference" if sdpa_backend() else "auto")


def precision() -> str | None:
    """PRECISION (unset: the inputs' dtype): bf16, fp16, fp32 or fp64, to which q, k and v are cast before attention (and before they
    travel). Outputs and gradients have the inputs' dtype. Under torch.compile it is read when a graph is made."""
    return _choice("PRECISION", _PRECISIONS) or None


def log_level() -> int | None:
    """LOG_LEVEL (unset: logging's own): debug, info, warning, error or critical, for the logger "magi_attention". At info it tells of each
    plan that is made. Read when the package is imported."""
    value = _value("LOG_LEVEL")  # names are checked later: a program may set others between import and first use
    if value and value not in _LOG_LEVELS:
        raise ValueError(f"{_PREFIX}LOG_LEVEL must be one of {', '.join(_LOG_LEVELS)}, got {value!r}")
    return _LOG_LEVELS[value] if value else None


def launcher_int(*names: str, default: int) -> int:
    """The first of these variables that is set, as torchrun and other launchers set them.

    Raises:
        ValueError: it is no int.
    """
    for name in names:
        value = os.environ.get(name)
        if value is not None:
            try:
                return int(value)
            except ValueError:
                raise ValueError(f"{name} must be an int, as torchrun sets it, got {value!r}") from None
    return default


def launcher_has_address() -> bool:
    """Whether a launcher has set where the ranks meet (MASTER_ADDR)."""
    return "MASTER_ADDR" in os.environ
