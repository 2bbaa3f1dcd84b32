"""What `torch.utils.flop_counter` counts for attention.

Counted are the cells that a mask attends; where its tables cannot be read (fake and meta tensors), all cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

import magi_attention.functional.ops  # noqa: F401 - makes the operators that are registered here
from magi_attention.mask.bands import area, bands_from_slices


def register_flops(name: str, num_cells: Callable[[Mapping[str, Any]], int]) -> None:
    """Let operator ``name`` of this package and its backward be counted. ``num_cells``: of a call, given its arguments by name."""
    operators = getattr(torch.ops.magi_attention, name), getattr(torch.ops.magi_attention, f"{name}_backward")
    # Forward: S = QK and O = PV. Backward: S once more, dQ and dK by head_dim; dP and dV by that of v.
    for operator, num_by_d, num_by_dv in zip(operators, (1, 3), (1, 2), strict=True):
        _register(operator, num_cells, num_by_d, num_by_dv)


def _register(operator: Any, num_cells: Callable[[Mapping[str, Any]], int], num_by_d: int, num_by_dv: int) -> None:
    names = [argument.name for argument in operator.default._schema.arguments]

    @register_flop_formula(operator, get_raw=True)
    def count(*args: Any, **kwargs: Any) -> int:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, v = given["q"], given["v"]
        return int(2 * num_cells(given) * q.shape[1] * (num_by_d * q.shape[2] + num_by_dv * v.shape[2]))


def _cells_of_tables(given: Mapping[str, Any]) -> int:
    tables = [given.get(name) for name in ("q_ranges", "k_ranges", "attn_type_map")]
    lengths = given["q"].shape[0], given["k"].shape[0]
    if any(x is not None and (x.is_meta or isinstance(x, FakeTensor)) for x in tables):
        return int(lengths[0] * lengths[1])
    q_ranges, k_ranges, types = (None if x is None else _to_host(x) for x in tables)
    assert q_ranges is not None and k_ranges is not None
    bands = bands_from_slices(q_ranges, k_ranges, np.zeros(len(q_ranges), np.int64) if types is None else types)
    for axis, length in enumerate(lengths):  # tables on a GPU may reach beyond the tensors
        bands[:, 2 * axis : 2 * axis + 2] = bands[:, 2 * axis : 2 * axis + 2].clip(0, length)
    return int(area(bands).sum())


def _to_host(table: Tensor) -> Any:
    return table.detach().cpu().numpy().astype(np.int64)


register_flops("flex_flash_attn", _cells_of_tables)
