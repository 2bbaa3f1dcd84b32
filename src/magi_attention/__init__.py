"""Exact attention over any slice mask, on one device or spread over many.

What a program calls is in `magi_attention.api`; one device alone needs no more than `magi_attention.functional`.
"""

__version__ = "0.1.0"
