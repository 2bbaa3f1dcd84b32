"""Random exchanges and the rows they move, made alike on every rank from one seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from magi_attention.plan import Exchange


def random_exchanges(seed: int, num_ranks: int) -> tuple[list[int], list[list[np.ndarray]]]:
    """``(num_rows, sent)``: rows that each rank holds, and ``sent[source][target]``, the ascending local rows that travel.

    Some ranks hold nothing, some pairs exchange nothing, ranks send to themselves, and in a third of the seeds one rank gets nothing.
    """
    rng = np.random.default_rng(seed)
    num_rows = [int(rng.choice([0, 1, 7, 40, 97])) for _ in range(num_ranks)]
    deaf = rng.integers(3 * num_ranks)  # a rank that receives nothing, if there is a rank of this number
    sent = []
    for rows in num_rows:
        share = rng.choice([0.0, 0.1, 0.6, 1.0], size=num_ranks)
        sent.append(
            [
                np.flatnonzero(rng.random(rows) < (0.0 if target == deaf else share[target]))
                for target in range(num_ranks)
            ]
        )
    return num_rows, sent


def exchange_of_rank(sent: list[list[np.ndarray]], rank: int) -> Exchange:
    """``rank``'s part, with runs of adjacent rows as one range."""
    ranges = [np.empty((0, 2), np.int64)]
    for rows in sent[rank]:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []
        ranges += [np.array([[run[0], run[-1] + 1]]) for run in runs]
    return Exchange(
        send_ranges=np.concatenate(ranges),
        send_splits=tuple(len(rows) for rows in sent[rank]),
        recv_splits=tuple(len(by_target[rank]) for by_target in sent),
    )


def random_rows(seed: int, num_rows: list[int], *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """``[num_rows[r], *shape]`` for each rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for rows in num_rows]


def delivered(rows: list[Tensor], sent: list[list[np.ndarray]], rank: int) -> Tensor:
    """What ``rank`` must receive of every rank's ``rows``: source by source."""
    return torch.cat([x[torch.from_numpy(by_target[rank])] for x, by_target in zip(rows, sent, strict=True)])
