"""One rank's part in one collective: which rows it sends to whom, and how many it gets from whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows that move in one group-cast (owner to users); group-reduce runs it backwards.

    ``send_ranges``: ``[n, 2]`` int64, half-open local row ranges, laid end to end in the send buffer: all rows for rank 0
    (ascending), then all for rank 1, and so on. A row may be sent to many ranks, to each at most once.
    ``send_splits``, ``recv_splits``: rows sent to, and received from, every rank of the group: ``len == cp_size``. The receive
    buffer holds them source by source.
    """

    send_ranges: np.ndarray
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)

    @property
    def num_received(self) -> int:
        return sum(self.recv_splits)
