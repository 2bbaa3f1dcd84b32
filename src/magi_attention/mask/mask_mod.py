"""A ``mask_mod`` that is asked: about the cells of tiles, about whether it reads ``b`` or ``h``; and what is told where that takes long."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from magi_attention.mask.bands import Ints
from magi_attention.mask.index_ranges import NotReadableError
from magi_attention.mask.tile_bounds import MaskMod

Cells = NDArray[np.bool_]

# The most cells that are evaluated one by one, all batches and heads together: minutes of work. A square of 32,768 tokens.
MOST_CELLS = 1 << 30
# The same where the function is followed, so that many cells are evaluated by one call.
MOST_CELLS_AT_ONCE = 1 << 34

_PACKAGE = str(Path(__file__).parent.parent)
_WHAT_TO_DO = (
    "Of q and k use only comparisons, logic, sums, products, floor divisions and look-ups in tensors of ints or booleans, or make the "
    "mask by from_document_ids, varlen, sliding_window, union and the like"
)


@dataclass(frozen=True, eq=False)
class Question:
    """A ``mask_mod`` that is asked about tiles, for one batch and head.

    ``is_elementwise``: proved to calculate with ints of which none leaves int32, element by element: then it says the same of many
    indices at once.
    """

    mask_mod: MaskMod
    b: int
    h: int
    lengths: tuple[int, int]
    device: str | torch.device
    is_elementwise: bool = False

    def ask(self, q_start: Ints, k_start: Ints, size: tuple[int, int]) -> Cells:
        """``[num_tiles, *size]`` bool: what the function says, inside the lengths, of tiles that begin at ``q_start``, ``k_start``.

        Raises:
            ValueError: the function fails, or returns something else than booleans.
        """
        ask = self._at_once if self.is_elementwise else self._as_flex_attention_does
        q, k = (torch.as_tensor(start, device=self.device) for start in (q_start, k_start))
        try:
            said: Cells = ask(q, k, size).cpu().numpy()
        except Exception as error:  # whatever a user's function raises
            raise ValueError(
                f"the mask_mod must take tensors (b, h, q, k) of indices below {self.lengths[0]} queries and {self.lengths[1]} keys, and "
                "return a tensor of booleans without a branch on their values, as flex_attention has it; got "
                f"{type(error).__name__}: {error}"
            ) from error
        inside_q = q_start[:, None] + np.arange(size[0]) < self.lengths[0]
        inside_k = k_start[:, None] + np.arange(size[1]) < self.lengths[1]
        cells: Cells = said & inside_q[:, :, None] & inside_k[:, None, :]
        return cells

    def _at_once(self, q_start: Tensor, k_start: Tensor, size: tuple[int, int]) -> Tensor:
        i, j = (torch.arange(length, device=self.device) for length in size)
        said = self._call((q_start[:, None] + i)[:, :, None], (k_start[:, None] + j)[:, None, :])
        return torch.as_tensor(said, device=self.device).expand(len(q_start), *size)

    def _as_flex_attention_does(self, q_start: Tensor, k_start: Tensor, size: tuple[int, int]) -> Tensor:
        def of_tile(_: Tensor, tile: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # A function that says the same of all says it without reading i or j.
            result: Tensor = self._call(q_start[tile] + i, k_start[tile] + j) & (i >= 0) & (j >= 0)
            return result

        said: Tensor = create_mask(of_tile, 1, len(q_start), *size, device=str(self.device))[0]
        return said

    def _call(self, q: Tensor, k: Tensor) -> Any:
        here_b, here_h = (torch.tensor(index, device=self.device) for index in (self.b, self.h))
        # Beyond the lengths, ask of the last: tables that the function reads need not reach further.
        said = self.mask_mod(here_b, here_h, q.clamp(max=self.lengths[0] - 1), k.clamp(max=self.lengths[1] - 1))
        if not isinstance(said, bool) and getattr(said, "dtype", None) != torch.bool:
            raise TypeError(f"it returns {getattr(said, 'dtype', type(said).__name__)}, not booleans")
        return said


class _Unread:
    """Stands for b or h: any use of its value fails. Taking its device, or making a tensor like it as ``and_masks`` does, is none."""

    _HARMLESS = ("device", "dtype", "shape", "ndim", "dim", "size", "new_ones", "new_zeros", "new_full", "new_tensor")
    _MAKERS = (torch.ones_like, torch.zeros_like, torch.full_like)

    def __init__(self, like: Tensor) -> None:
        self._like = like

    def __getattr__(self, name: str) -> Any:
        if name not in self._HARMLESS:
            raise AttributeError(name)
        return getattr(self._like, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls._MAKERS or not isinstance(args[0] if args else None, cls):
            raise TypeError("b or h is read")
        return func(args[0]._like, *args[1:], **(kwargs or {}))

    def _fail(self, *_: object) -> Any:
        raise TypeError("b or h is read")

    # What every object has, and would answer: that it is unlike an index.
    __eq__ = __ne__ = __hash__ = __bool__ = __str__ = __repr__ = _fail


def reads_batch(mask_mod: MaskMod, device: str | torch.device) -> bool:
    """Whether it may use the value of ``b``; True wherever that is not known."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return _fails(mask_mod, _Unread(zero), zero, zero)


def reads_head(mask_mod: MaskMod, device: str | torch.device) -> bool:
    """As `reads_batch`, of ``h``."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return _fails(mask_mod, zero, _Unread(zero), zero)


def _fails(mask_mod: MaskMod, b: Any, h: Any, at: Tensor) -> bool:
    try:
        mask_mod(b, h, at, at)
    except Exception:  # whatever a user's function raises when it is given what is no index
        return True
    return False


def warn_of_cells(error: NotReadableError, num_cells: int) -> None:
    """One UserWarning, at the caller's line, that every cell is evaluated, and why."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(
        f"each of the {num_cells:,} cells of this mask_mod is evaluated, which takes long, because what it says of whole tiles cannot be "
        f"proved: {error}. {_WHAT_TO_DO}",
        UserWarning,
        stacklevel=depth,
    )


def check_num_cells(num_cells: int, error: NotReadableError | None) -> None:
    """ValueError where more cells have to be evaluated than is done. ``error``: what stopped the proof; None: it decides too few tiles."""
    most = MOST_CELLS_AT_ONCE if error is None else MOST_CELLS
    if num_cells > most:
        reason = "its tiles are neither attended whole nor not at all" if error is None else str(error)
        raise ValueError(
            f"{num_cells:,} cells of this mask_mod would have to be evaluated, more than the {most:,} that are, because what it says of "
            f"whole tiles cannot be proved: {reason}. {_WHAT_TO_DO}"
        )
