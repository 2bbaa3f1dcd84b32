"""Values as people type them: 1M tokens, 32:8 heads, an 8x8 mesh, 400T FLOP/s, 30us."""

from __future__ import annotations

import argparse
import re

# Tokens are counted in powers of two, as model sizes and lengths are; rates in powers of ten, as data sheets are.
_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_DECIMAL = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SECONDS = {"": 1.0, "S": 1.0, "MS": 1e-3, "US": 1e-6, "NS": 1e-9}


def count(text: str) -> int:
    """A positive number of tokens: 4096, 8K (8,192), 1M (1,048,576)."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    number = int(match[1]) * _BINARY[match[2]] if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 4096, 8K or 1M, got {text!r}")
    return number


def rate(text: str) -> float:
    """Something a second: 400e12, 400T, 40G."""
    return _scaled(text, _DECIMAL, "a positive rate such as 400T or 40e9")


def seconds(text: str) -> float:
    """A time: 3e-5, 30us, 1ms; 0 is one."""
    return _scaled(text, _SECONDS, "a time such as 30us or 3e-5", may_be_zero=True)


def heads(text: str) -> tuple[int, int]:
    """Heads of queries and of keys and values: 32:8, or 32 for equally many."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    num_q, num_kv = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if num_kv < 1 or num_q < 1 or num_q % num_kv:
        raise argparse.ArgumentTypeError(
            f"expected heads of queries and of keys such as 32:8, the first a multiple of the second, got {text!r}"
        )
    return num_q, num_kv


def mesh(text: str) -> tuple[int, int]:
    """Nodes and ranks of a node: 8x8."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    num_nodes, per_node = (int(match[1]), int(match[2])) if match else (0, 0)
    if num_nodes < 1 or per_node < 1:
        raise argparse.ArgumentTypeError(f"expected nodes x ranks of a node, such as 8x8, got {text!r}")
    return num_nodes, per_node


def degree(text: str) -> int | None:
    """Remote stages: a positive number, or auto (None)."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of stages, or auto, got {text!r}")
    return int(text)


def _scaled(text: str, units: dict[str, float], expected: str, may_be_zero: bool = False) -> float:
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)([a-z]*)", text.lower())
    unit = units.get(match[2].upper()) if match else None
    number = float(match[1]) * unit if match and unit else -1.0
    if not (0 <= number < float("inf")) or (number == 0 and not may_be_zero):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number
