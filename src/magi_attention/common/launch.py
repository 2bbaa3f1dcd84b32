"""Launching Triton's kernels at less cost to the host.

``kernel[grid](...)`` looks at every argument, decides anew how each is specialised, and finds the compiled kernel by the text of all
that: tens of microseconds a launch, more where tensor descriptors are among them. A `Launcher` asks once for arguments that Triton would
not tell apart, and then launches what was compiled for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from magi_attention.common.tensor_kinds import address


class Described(Protocol):
    """An argument that Triton takes in a form of its own, but launches from any object with the same attributes."""

    def likeness(self) -> Hashable:
        """What its type in the kernel depends on."""
        ...

    def in_full(self) -> Any:
        """The form that Triton takes."""
        ...


class Launcher:
    """A kernel under ``triton.jit`` or ``gluon.jit``, whose constants are its last parameters.

    It is launched on the device that is named, whichever is the current one.
    What is compiled once is launched without Triton's hooks before a run, and without regard to debug settings that have changed since.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constants = tuple(kernel.params[at].name for at in kernel.constexprs) if hasattr(kernel, "params") else ()
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        num_programs: int,
        device: torch.device,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Hashable],
        **options: Any,
    ) -> None:
        """Launch ``num_programs``. ``options`` of the compiler: ``num_warps``, ``num_stages``."""
        grid = (num_programs, 1, 1)

        def by_triton() -> Any:
            for x in arguments:
                if isinstance(x, Tensor):
                    address(x)
            return self.kernel[grid](*map(_in_full, arguments), **constants, **options)

        if device.type != "cuda":  # interpreted
            by_triton()
            return
        here = torch.cuda.current_device()
        index = here if device.index is None else device.index
        values = tuple(constants[name] for name in self._constants)
        with nullcontext() if index == here else torch.cuda.device(index):
            if torch.version.hip:  # on AMD's GPUs it matters how large a tensor is
                by_triton()
                return
            at = (index, *map(likeness, arguments), *values, *options.items())
            compiled = self._compiled.get(at)
            if compiled is not None:
                compiled[grid](*arguments, *values)
                return
            self._compiled[at] = by_triton()


def likeness(x: Any) -> Hashable:
    """Equal for arguments that Triton compiles the same code for, on NVIDIA's GPUs; perhaps not only for those.

    Triton specialises integers that are 1 or multiples of 16, by their width, and pointers to multiples of 16 bytes.
    """
    if type(x) is int:
        if -(2**31) <= x < 2**31:
            return 1 if x == 1 else 16 if x % 16 == 0 else 0
        return x % 16 == 0, x < 2**63
    if isinstance(x, (float, bool)):
        return "bool" if isinstance(x, bool) else "float"
    if isinstance(x, Tensor):
        return x.dtype, address(x) % 16 == 0
    described: Described = x
    return described.likeness()


def _in_full(x: Any) -> Any:
    return x.in_full() if hasattr(x, "in_full") else x
