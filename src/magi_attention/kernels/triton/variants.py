"""The kernels as `forward` and `backward` launch them, for the compiler alone: see ``kernels.ahead_of_time``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magi_attention.kernels.ahead_of_time import AotVariant
from magi_attention.kernels.triton.backward import dkdv_kernel, dq_kernel
from magi_attention.kernels.triton.configs import Tiles, most_spilled, padded, pick_tiles
from magi_attention.kernels.triton.forward import forward_kernel

_KERNELS = {"forward": forward_kernel, "dkdv": dkdv_kernel, "dq": dq_kernel}
# Heads narrower than their block; v narrower than q.
_ODD_HEAD_DIMS = ((80, 80), (192, 128))
_CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "softcap": {"CAPPED": True},
    "merge": {"MERGE": True, "ADD": True, "RAW": True},
}
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_GROUP = 8
_OUTPUTS = ("p_out", "p_dq", "p_dk", "p_dv")
_FLOAT32 = ("p_lse", "p_delta", "p_max")


def aot_variants(arch: str) -> list[AotVariant]:
    """Every configuration of the table for ``arch`` (``sm_90``, ``gfx942``, ...).

    Each row of the table in all cases in bf16 (whose code is that of fp16, but for the product's type) and plain in fp32; the odd head
    dims plain.
    """
    rows = [(columns, columns) for columns in (64, 128, 256)]
    wanted = [(head_dims, "bf16", case) for head_dims in rows for case in _CASES]
    wanted += [(head_dims, "bf16", "plain") for head_dims in _ODD_HEAD_DIMS]
    wanted += [((128, 128), "fp16", "plain")]
    wanted += [(head_dims, "fp32", "plain") for head_dims in rows]
    return [_variant(arch, kernel, *one) for one in wanted for kernel in _KERNELS]


def _variant(arch: str, kernel: str, head_dims: tuple[int, int], dtype: str, case: str) -> AotVariant:
    itemsize = _ITEMSIZE[dtype]
    tiles: Tiles = getattr(pick_tiles(*head_dims, itemsize, arch), kernel)
    function, values = _KERNELS[kernel], _constexprs(head_dims, tiles, _CASES[case])
    result_dtype = "fp32" if case == "merge" else dtype
    signature = {name: _type_of(name, values, dtype, result_dtype) for name in function.arg_names}
    return AotVariant(
        kernel=kernel,
        head_dims=head_dims,
        dtype=dtype,
        case=case,
        function=function,
        signature=signature,
        constexprs={name: values[name] for name, type_ in signature.items() if type_ == "constexpr"},
        # Memory that torch allocates, and strides of whole heads of these dims.
        aligned=frozenset(name for name in signature if name.startswith(("p_", "s_"))),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        uses_matrix_units=dtype != "fp32",
        most_spilled=most_spilled(arch, kernel, *head_dims, itemsize),
        is_representative=_is_representative(arch, head_dims, dtype, case),
    )


def _is_representative(arch: str, head_dims: tuple[int, int], dtype: str, case: str) -> bool:
    wanted = ((64, 64), (128, 128), (256, 256)) if arch == "sm_90" else ((128, 128),)
    return dtype == "bf16" and case == "plain" and head_dims in wanted


def _constexprs(head_dims: tuple[int, int], tiles: Tiles, case: Mapping[str, bool]) -> dict[str, Any]:
    d, dv = head_dims
    sizes = {"GROUP": _GROUP, "D": d, "DV": dv, "BLOCK_D": padded(d), "BLOCK_DV": padded(dv)}
    flags = {name: case.get(name, False) for name in ("CAPPED", "RAW", "MERGE", "ADD")}
    return {**sizes, "TILE_Q": tiles.q, "TILE_K": tiles.k, **flags, "PRECISION": "ieee"}


def _type_of(name: str, constexprs: Mapping[str, Any], dtype: str, result_dtype: str) -> str:
    if name in constexprs:
        return "constexpr"
    if name.startswith("p_"):
        inputs = {"p_q", "p_k", "p_v", "p_do"}
        element = (
            dtype if name in inputs else result_dtype if name in _OUTPUTS else "fp32" if name in _FLOAT32 else "i32"
        )
        return f"*{element}"
    return "fp32" if name.startswith(("scale", "cap")) else "i32"
