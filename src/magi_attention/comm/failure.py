"""What is said when a collective fails: which one, on which rank, who was awaited, and who never came.

No message is exchanged until something has failed. Then every rank that sees the failure leaves a note in the group's store, and names
the ranks that have left none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

# How long a rank that has failed looks for its peers' notes. The first failure closes the connections of the others, so theirs follow
# in milliseconds unless they are computing.
SECONDS_FOR_NOTES = 2.0


class CommTimeoutError(RuntimeError):
    """A collective did not complete, because a peer did not take part within the process group's timeout, or is gone."""


@dataclass(frozen=True)
class Call:
    """One collective, as this rank sees it.

    ``number`` counts this package's collectives over the group, the same on every rank. ``sources`` and ``targets`` are the ranks of the
    group that send rows to this one and get rows from it.
    """

    group: dist.ProcessGroup
    number: int
    label: str
    sources: Sequence[int]
    targets: Sequence[int]

    def __str__(self) -> str:
        return f"collective #{self.number} ({self.label})"


def describe_failure(call: Call, seconds: float, cause: Exception) -> CommTimeoutError:
    """The error to raise for ``call``, which failed with ``cause`` after ``seconds``. Takes up to `SECONDS_FOR_NOTES`."""
    ranks = dist.get_process_group_ranks(call.group)
    own = dist.get_rank(call.group)
    due = []
    for direction, partners in (("from", call.sources), ("to", call.targets)):
        if others := [rank for rank in partners if rank != own]:
            due.append(f"{direction} {_name(others, ranks)}")
    return CommTimeoutError(
        f"{call} failed on rank {dist.get_rank()} after {seconds:.1f} s. Rows were due {' and '.join(due) or 'from and to nobody'}. "
        f"{_ask_around(call, ranks)} How long a rank waits is the timeout of the process group "
        f"(init_process_group(timeout=...)). The backend says: {cause}"
    )


def _name(group_ranks: Sequence[int], ranks: Sequence[int]) -> str:
    """Ranks of the group, as global ranks, in words."""
    return f"rank{'s' if len(group_ranks) != 1 else ''} {', '.join(str(ranks[rank]) for rank in group_ranks)}"


def _ask_around(call: Call, ranks: Sequence[int]) -> str:
    """Who never came, and who stopped elsewhere, in the whole group: a peer that failed may have lost a peer of its own."""
    others = [rank for rank in range(len(ranks)) if rank != dist.get_rank(call.group)]
    try:
        notes = _exchange_notes(call, others)
    except RuntimeError as error:
        return f"Nobody can be asked who is missing: the group's store does not answer ({error}), so its host, often rank 0, may be gone."
    silent = [rank for rank in others if rank not in notes]
    if silent:
        said = [
            f"No word from {_name(silent, ranks)}: dead, stuck, busy elsewhere, or not calling this; look at the first error there."
        ]
    else:
        said = ["All ranks report a failure."]
    said += [f"Rank {ranks[rank]} failed in {note}." for rank, note in notes.items() if note != str(call)]
    return " ".join(said)


def _exchange_notes(call: Call, others: Sequence[int]) -> dict[int, str]:
    """Leave this rank's note; the notes of ``others`` that are there within `SECONDS_FOR_NOTES`, by rank of the group."""
    store = c10d._get_process_group_store(call.group)
    store.set(_key(dist.get_rank(call.group)), str(call))
    deadline, pause = time.monotonic() + SECONDS_FOR_NOTES, 0.02
    while not store.check([_key(rank) for rank in others]) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return {rank: store.get(_key(rank)).decode() for rank in others if store.check([_key(rank)])}


def _key(rank: int) -> str:
    return f"magi_attention/failed/{rank}"
