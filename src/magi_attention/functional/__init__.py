"""Attention on one device, differentiable."""

from magi_attention.functional.flex_flash_attn import flex_flash_attn_func

__all__ = ["flex_flash_attn_func"]
