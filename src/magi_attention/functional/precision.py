"""The dtype that the environment asks attention to compute in: inputs are cast to it, and results back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from magi_attention import env
from magi_attention.common.enum import MagiAttentionPrecision
from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.kernels.precision import accumulation_dtype

P = ParamSpec("P")


def _asked() -> str | None:
    return env.precision()


# As `torch.compiler.assume_constant_result` does, which would import the compiler: the environment is read when a graph is made, and the
# casts are part of the graph. A torch that does not know the mark traces the function instead.
_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_asked_precision(
    attend: Callable[P, tuple[Tensor, AttnForwardMeta]],
) -> Callable[P, tuple[Tensor, AttnForwardMeta]]:
    """``attend(q, k, v, ...)``, computed in the dtype that ``MAGI_ATTENTION_PRECISION`` names, whatever autocast says.

    Results and gradients have the dtypes that they have without the variable, which are those of the inputs' dtype.
    """

    @wraps(attend)
    def cast(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, AttnForwardMeta]:
        asked = _asked()
        if asked is None or not _are_floating(q, k, v):
            return attend(q, k, v, *args, **kwargs)  # type: ignore[arg-type] # which refuses what is not floating
        dtype = MagiAttentionPrecision(asked).to_torch_dtype()
        # meta has no autocast
        with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
            out, meta = attend(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs)  # type: ignore[arg-type]
        wide = accumulation_dtype(q.dtype)
        return out.to(q.dtype), AttnForwardMeta(
            lse=None if meta.lse is None else meta.lse.to(wide),
            max_logits=None if meta.max_logits is None else meta.max_logits.to(wide),
        )

    return cast  # type: ignore[return-value]


def _are_floating(*tensors: Any) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors)
