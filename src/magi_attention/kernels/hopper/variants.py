"""The kernels as `forward` and `backward` launch them, for the compiler alone: see ``kernels.ahead_of_time``."""

from __future__ import annotations

from typing import Any

import torch

from magi_attention.kernels.ahead_of_time import AotVariant
from magi_attention.kernels.hopper.backward import backward_kernel
from magi_attention.kernels.hopper.configs import (
    BACKWARD_TILES,
    CONSUMER_ROWS,
    FORWARD_TILES,
    HEAD_DIMS,
    MOST_SPILLED,
    NUM_CONSUMERS,
)
from magi_attention.kernels.hopper.descriptors import GLUON_DTYPES, row_layout
from magi_attention.kernels.hopper.forward import forward_kernel
from magi_attention.kernels.hopper.statistics import STATISTICS_LAYOUT

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def aot_variants(arch: str) -> list[AotVariant]:
    """Every configuration of the tables; none for other architectures than sm_90."""
    if arch != "sm_90":
        return []
    wanted = [("bf16", case) for case in ("plain", "merge")] + [("fp16", "plain")]
    both = [make(d, *one) for d in HEAD_DIMS for one in wanted for make in (_forward, _backward)]
    return both + [_backward(d, "bf16", "in step") for d in HEAD_DIMS if BACKWARD_TILES[d].in_step]


def _descriptor(rows: int, columns: int, dtype: str) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}],{row_layout(rows, columns, GLUON_DTYPES[_DTYPES[dtype]])!r}>"


def _forward(d: int, dtype: str, case: str) -> AotVariant:
    tiles, merges = FORWARD_TILES[d], case == "merge"
    by_row, by_block = _descriptor(CONSUMER_ROWS, d, dtype), _descriptor(tiles.block, d, dtype)
    described = {"d_q": by_row, "d_k": by_block, "d_v": by_block, "out": "*fp32" if merges else by_row}
    flags = {"TMA_OUT": not merges, "MERGE": merges, "RAW": merges, "TURNS": tiles.turns}
    sizes = {"D": d, "BLOCK": tiles.block, "STAGES": tiles.stages, "CONSUMERS": NUM_CONSUMERS}
    return _variant("forward", d, dtype, case, forward_kernel, described, sizes | flags, tiles.registers)


def _backward(d: int, dtype: str, case: str) -> AotVariant:
    tiles, keys = BACKWARD_TILES[d], CONSUMER_ROWS * NUM_CONSUMERS
    by_query, by_key = _descriptor(tiles.block, d, dtype), _descriptor(keys, d, dtype)
    statistics = f"tensordesc<fp32[{tiles.block}],{STATISTICS_LAYOUT!r}>"
    described = {"d_q": by_query, "d_k": by_key, "d_v": by_key, "d_do": by_query, "d_lse": statistics}
    gradient = "*fp32" if case == "merge" else f"*{dtype}"
    described |= {"d_delta": statistics, "p_dk": gradient, "p_dv": gradient}
    described["d_dq"] = _descriptor(CONSUMER_ROWS, tiles.dq_columns(d), "fp32")
    sizes = {"D": d, "BLOCK": tiles.block, "STAGES": tiles.stages, "IN_STEP": case == "in step"}
    return _variant("backward", d, dtype, case, backward_kernel, described, sizes, tiles.registers)


def _variant(
    kernel: str, d: int, dtype: str, case: str, function: Any, described: dict[str, str], values: dict[str, Any], registers: int
) -> AotVariant:  # fmt: skip
    values = {**values, "REGISTERS": registers}
    signature = {
        name: "constexpr" if name in values else described.get(name) or _type_of(name) for name in function.arg_names
    }
    return AotVariant(
        kernel=kernel,
        head_dims=(d, d),
        dtype=dtype,
        case=case,
        function=function,
        signature=signature,
        constexprs=values,
        # Memory that torch allocates. Other arguments are not specialised.
        aligned=frozenset(name for name, type_ in signature.items() if type_.startswith("*")),
        options={"num_warps": 4},
        most_spilled=MOST_SPILLED.get((kernel, d, case), 0),
        is_gluon=True,
        is_representative=d == 128 and dtype == "bf16" and case == "plain",
        keeps_products_in_flight=True,
    )


def _type_of(name: str) -> str:
    if name.startswith("p_"):
        return "*fp32" if name in ("p_lse", "p_top") else "*i32"
    return "fp32" if name.startswith("scale") else "i32"
