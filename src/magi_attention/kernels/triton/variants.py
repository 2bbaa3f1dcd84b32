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
# Heads whose strides are no multiples of 16, which the compiler is told of those that are.
_UNALIGNED_HEAD_DIMS = ((40, 24), (40, 40), (24, 24), (33, 65))
_HEAD_STRIDES = frozenset({"s_qh", "s_kh", "s_vh", "s_doh"})
# Views of wider buffers: nothing is known of where a row begins.
_VIEWS = _HEAD_STRIDES | {"s_qt", "s_kt", "s_vt", "s_dot", "p_q", "p_k", "p_v", "p_do"}
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
    dims plain; plain and merged, heads that are not aligned and views.
    """
    rows = [(columns, columns) for columns in (64, 128, 256)]
    wanted: list[tuple[Any, ...]] = [(head_dims, "bf16", case) for head_dims in rows for case in _CASES]
    wanted += [(head_dims, "bf16", "plain") for head_dims in _ODD_HEAD_DIMS]
    wanted += [((128, 128), "fp16", "plain")]
    wanted += [(head_dims, "fp32", "plain") for head_dims in rows]
    for case in ("plain", "merge"):
        wanted += [(head_dims, "bf16", case, _HEAD_STRIDES) for head_dims in _UNALIGNED_HEAD_DIMS]
        wanted += [(head_dims, "bf16", case, _VIEWS) for head_dims in rows[:2]]
    return [_variant(arch, kernel, *one) for one in wanted for kernel in _KERNELS]


def _variant(
    arch: str, kernel: str, head_dims: tuple[int, int], dtype: str, case: str, unaligned: frozenset[str] = frozenset()
) -> AotVariant:
    itemsize = _ITEMSIZE[dtype]
    tiles: Tiles = getattr(pick_tiles(*head_dims, itemsize, arch), kernel)
    function, values = _KERNELS[kernel], _constexprs(head_dims, itemsize, arch, tiles, _CASES[case])
    result_dtype = "fp32" if case == "merge" else dtype
    name_of_case = f"{case} unaligned" if unaligned else case
    signature = {name: _type_of(name, values, dtype, result_dtype) for name in function.arg_names}
    return AotVariant(
        kernel=kernel,
        head_dims=head_dims,
        dtype=dtype,
        case=name_of_case,
        function=function,
        signature=signature,
        constexprs={name: values[name] for name, type_ in signature.items() if type_ == "constexpr"},
        # Memory that torch allocates, and strides of whole heads of these dims.
        aligned=frozenset(name for name in signature if name.startswith(("p_", "s_"))) - unaligned,
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        uses_matrix_units=dtype != "fp32",
        most_spilled=most_spilled(arch, kernel, *head_dims, itemsize, aligned=not unaligned),
        is_representative=_is_representative(arch, kernel, head_dims, dtype, name_of_case),
    )


def _is_representative(arch: str, kernel: str, head_dims: tuple[int, int], dtype: str, case: str) -> bool:
    wanted = [((128, 128), "plain")]
    if arch == "sm_90":
        wanted += [((64, 64), "plain"), ((256, 256), "plain")]
        wanted += [((40, 24), "merge unaligned")] * (kernel == "forward")
    return dtype == "bf16" and (head_dims, case) in wanted


def _constexprs(
    head_dims: tuple[int, int], itemsize: int, arch: str, tiles: Tiles, case: Mapping[str, bool]
) -> dict[str, Any]:
    (d, dv), (block_d, block_dv) = head_dims, (padded(columns, itemsize, arch) for columns in head_dims)
    sizes = {"GROUP": _GROUP, "D": d, "DV": dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
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
