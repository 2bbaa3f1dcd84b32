"""What is trained, on what, for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the numbers. The number of ranks is not among them.

    Attributes:
        num_steps: optimiser steps, each on one packed sequence.
        num_tokens: bytes of a packed sequence.
        min_document, max_document: bytes of a document; each is the beginning of a file.
        window: bytes that the windowed layers look back, beside the one they are at.
        num_layers: every second one is windowed.
        num_heads_q, num_heads_kv, head_dim: of attention; the model is ``num_heads_q * head_dim`` wide.
        hidden_dim: of the feed-forward layers.
        learning_rate: at its peak, after ``num_warmup`` steps; it falls to a tenth along a cosine.
        dtype: of weights and of all that is computed, "float32" or "float64".
        device: where it is computed, "cpu" or "cuda". Ranks share GPUs where there are fewer of them.
        seed: of weights and of the order of documents.
    """

    num_steps: int = 24
    num_tokens: int = 8192
    min_document: int = 128
    max_document: int = 4096
    window: int = 256
    num_layers: int = 4
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 32
    hidden_dim: int = 344
    learning_rate: float = 6e-3
    num_warmup: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_heads_q * self.head_dim
