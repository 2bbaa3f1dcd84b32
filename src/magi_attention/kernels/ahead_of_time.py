"""What a GPU backend says of its kernels so that they can be compiled, and judged, on a machine without a GPU.

A backend offers ``aot_variants(arch)`` in its module ``variants``: each kernel as it is launched on that architecture, one value a
variant. ``testing.ahead_of_time`` compiles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotVariant:
    """One kernel as it is launched.

    Attributes:
        kernel: its name in the report: forward, dkdv, dq.
        head_dims: of q and k, and of v.
        dtype: of the inputs, as Triton writes it: bf16, fp16, fp32.
        case: what else distinguishes it: plain, softcap, merge.
        function: the function under ``triton.jit`` or ``gluon.jit``, not interpreted.
        signature: the type of every argument in order, as Triton writes it (``*bf16``, ``i32``, ``constexpr``).
        constexprs: the values of those of type ``constexpr``.
        aligned: arguments that are multiples of 16 (pointers: of 16 bytes) whenever it is launched.
        options: of the compiler: ``num_warps``, ``num_stages``, ...
        uses_matrix_units: whether its products must run on the matrix units. Those of float32 inputs, being IEEE, do not.
        most_spilled: bytes a thread that the compiler may keep in memory for want of registers.
        is_gluon: whether it is written in Gluon.
        keeps_products_in_flight: whether some products must run while others are waited for, where machine code tells (sm_90).
        is_representative: whether it is among the few that stand for all where there is no time for all.
    """

    kernel: str
    head_dims: tuple[int, int]
    dtype: str
    case: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    uses_matrix_units: bool = True
    most_spilled: int = 0
    is_gluon: bool = False
    is_representative: bool = False
    keeps_products_in_flight: bool = False
