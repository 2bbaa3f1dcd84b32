"""Mend bfloat16 products in Triton's interpreter, which multiplies the bit patterns as if they were integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def mend() -> None:
    """From now on the interpreter widens bfloat16 operands of a product to float32, which holds them exactly."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, _widened(a), _widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _widened(handle: Any) -> Any:
    scalar = handle.dtype.scalar if hasattr(handle.dtype, "scalar") else handle.dtype
    if scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
