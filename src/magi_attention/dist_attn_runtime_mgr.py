"""Kept for programs already written: the key under the name of the module that used to hold it."""

from magi_attention.runtime.key import DistAttnRuntimeKey

__all__ = ["DistAttnRuntimeKey"]
