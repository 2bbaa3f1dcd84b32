"""A small language model of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

It knows nothing of ranks. Tokens come with their positions, and attention is a function that it is given.

Shapes: n tokens, d = dim, h = heads, e = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import NUM_BYTES
from settings import Settings

# (q [n, h, e], k [n, h_kv, e], v [n, h_kv, e], is_windowed) -> [n, h, e]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, ``[n, 1, e / 2]`` each: the angles of rotary position embedding (Su et al., 2021)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    frequencies = 10_000.0**-exponents
    angles = positions.to(torch.float64)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x[i], x[i + e / 2])`` of ``[n, h, e]`` by the angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Projections and rotation around the function that attends."""

    def __init__(self, settings: Settings, is_windowed: bool) -> None:
        super().__init__()
        self.is_windowed, self.head_dim = is_windowed, settings.head_dim
        self.to_q = nn.Linear(settings.dim, settings.num_heads_q * settings.head_dim, bias=False)
        self.to_k = nn.Linear(settings.dim, settings.num_heads_kv * settings.head_dim, bias=False)
        self.to_v = nn.Linear(settings.dim, settings.num_heads_kv * settings.head_dim, bias=False)
        self.to_out = nn.Linear(settings.num_heads_q * settings.head_dim, settings.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.to_q, self.to_k, self.to_v))
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.is_windowed)  # [n, h, e]
        projected: Tensor = self.to_out(out.flatten(1))
        return projected


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.gate = nn.Linear(settings.dim, settings.hidden_dim, bias=False)
        self.up = nn.Linear(settings.dim, settings.hidden_dim, bias=False)
        self.down = nn.Linear(settings.hidden_dim, settings.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


class Layer(nn.Module):
    """Attention, then feed-forward, each beside a residual."""

    def __init__(self, settings: Settings, is_windowed: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(settings.dim), Attention(settings, is_windowed)
        self.feed_forward_norm, self.feed_forward = RMSNorm(settings.dim), FeedForward(settings)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Bytes to the logits of the byte that follows; every second layer is windowed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_dim = settings.head_dim
        self.embedding = nn.Embedding(NUM_BYTES, settings.dim)
        self.layers = nn.ModuleList(Layer(settings, is_windowed=i % 2 == 1) for i in range(settings.num_layers))
        self.norm = RMSNorm(settings.dim)
        self.to_logits = nn.Linear(settings.dim, NUM_BYTES, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Activations of unit size throughout, residual branches that add up to it, and logits near zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("to_out.weight", "down.weight")):
                    std *= (2 * len(self.layers)) ** -0.5
                nn.init.normal_(parameter, std=std)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.to_logits.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """``[n, NUM_BYTES]`` logits of ``[n]`` int64 tokens, which are at the ``[n]`` int64 positions of their documents."""
        x = self.embedding(tokens)
        cos, sin = rotation(positions, self.head_dim, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits
