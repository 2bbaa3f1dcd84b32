"""Text: the source files of the Python that runs this, byte by byte, packed as documents into long sequences."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from settings import Settings

NUM_BYTES = 256  # the vocabulary
IGNORED = -100  # a label that cross entropy leaves out


@dataclass(frozen=True)
class Sequence:
    """Documents end to end. ``tokens``: ``[num_tokens]`` int64. ``cu_seqlens``: where each document begins, and the end of the last."""

    tokens: Tensor
    cu_seqlens: list[int]

    @property
    def num_predictions(self) -> int:
        """Tokens that have a next one in their document."""
        return self.cu_seqlens[-1] - (len(self.cu_seqlens) - 1)


def source_files() -> list[Path]:
    """The modules of the standard library, in an order that is the same everywhere; its tests and what was installed left out."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    files = (path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def packed_sequences(settings: Settings) -> Iterator[Sequence]:
    """Sequences of ``num_tokens`` bytes without end. Each document is the beginning of a file, the files in random order.

    Lengths are log-uniform, so that there are a few long documents among many short ones, as in most text that models are trained on.
    The last document of a sequence is cut to fit.
    """
    files, random = source_files(), np.random.default_rng(settings.seed)
    if not files:
        raise FileNotFoundError(
            "this Python has no source files of its standard library (no .py under its stdlib folder); use one that has"
        )
    shortest, longest = math.log(settings.min_document), math.log(settings.max_document)
    waiting: list[int] = []
    while True:
        documents: list[bytes] = []
        room = settings.num_tokens
        while room:
            waiting = waiting or random.permutation(len(files)).tolist()
            length = round(math.exp(random.uniform(shortest, longest)))
            # An empty file is no document.
            if document := files[waiting.pop()].read_bytes()[: min(length, room)]:
                documents.append(document)
                room -= len(document)
        tokens = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
        yield Sequence(tokens, [0, *np.cumsum([len(document) for document in documents]).tolist()])


def positions_in_documents(positions: Tensor, cu_seqlens: list[int]) -> Tensor:
    """``[n]`` how far behind the beginning of its document each of the ``[n]`` global positions is."""
    starts = torch.tensor(cu_seqlens[:-1], device=positions.device)
    return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]


def ends_document(positions: Tensor, cu_seqlens: list[int]) -> Tensor:
    """``[n]`` bool: whether the token at each of the ``[n]`` global positions is the last of its document."""
    return torch.isin(positions + 1, torch.tensor(cu_seqlens[1:], device=positions.device))
