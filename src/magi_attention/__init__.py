"""Exact attention over any slice mask, on one device or spread over many.

What a program calls is in `magi_attention.api`; one device alone needs no more than `magi_attention.functional`.
"""

import logging
from typing import TYPE_CHECKING, Any

from magi_attention import env

__version__ = "0.1.0"
__all__ = ["init_dist_attn_runtime_key", "init_dist_attn_runtime_mgr"]

if TYPE_CHECKING:
    from magi_attention.dist_attn_runtime_mgr import init_dist_attn_runtime_key, init_dist_attn_runtime_mgr
else:
    # Kept for programs already written. Imported when asked for: the package alone imports no torch.
    _KEPT = ("init_dist_attn_runtime_key", "init_dist_attn_runtime_mgr")

    def __getattr__(name: str) -> Any:
        if name in _KEPT:
            from magi_attention import dist_attn_runtime_mgr

            return getattr(dist_attn_runtime_mgr, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _configure_logging() -> None:
    """Set the level that the environment asks for, and print to stderr for as long as the program has set up no logging of its own."""
    level = env.log_level()
    if level is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        handler.addFilter(lambda record: not logging.getLogger().handlers)
        logger = logging.getLogger(__name__)
        logger.setLevel(level)
        logger.addHandler(handler)


_configure_logging()
