"""Small values on which all ranks of a group must agree."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.comm.failure import CommTimeoutError
from magi_attention.comm.pending import Pending, start
from magi_attention.comm.shards import gather_rows
from magi_attention.comm.transport import group_device, group_size

_REFUSED = bytes(hashlib.sha256().digest_size)  # in place of a digest
_SAME_ARGUMENTS = "Every rank of the group must be given the same mask, lengths, heads, config and environment, in the same order of calls"


@torch.no_grad()
def all_reduce_max(x: Tensor, group: dist.ProcessGroup | None, *, label: str = "max_logits") -> Tensor:
    """The elementwise maximum of the ranks' ``x``, on every rank, in a new tensor; ``x`` itself in a group of one."""
    return _all_reduce(x, dist.ReduceOp.MAX, group, label)


@torch.no_grad()
def dsink_all_reduce(dsink: Tensor, op: str, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' shares of the sink's gradient: this rank's own (``"none"``), their sum, or their mean (``"avg"``)."""
    if op == "none":
        return dsink
    assert op in ("sum", "avg"), op
    total = _all_reduce(dsink, dist.ReduceOp.SUM, group, f"{op} of dsink")
    return total / group_size(group) if op == "avg" else total


def assert_same_plan(digest: bytes, group: dist.ProcessGroup | None) -> None:
    """Compare the digests of what the ranks plan. A collective: every rank must call it, or `tell_refusal` instead.

    Raises:
        ValueError: on every rank, naming the ranks that refused their arguments, or that differ from the most common digest.
    """
    if group_size(group) == 1:
        return
    assert group is not None
    digests = _gather_digests(hashlib.sha256(digest).digest(), group)
    ranks = dist.get_process_group_ranks(group)
    refused = [rank for rank, theirs in zip(ranks, digests, strict=True) if theirs == _REFUSED]
    if refused:
        raise ValueError(
            f"rank(s) {_list(refused)} refused what they were given for a key, where rank {dist.get_rank()} did not: the error there says "
            f"why. {_SAME_ARGUMENTS}"
        )
    # The most common digest; the lowest rank's among equally common ones, since a Counter keeps the order of arrival.
    common = Counter(digests).most_common(1)[0][0]
    odd = [rank for rank, theirs in zip(ranks, digests, strict=True) if theirs != common]
    if odd:
        rest = [rank for rank in ranks if rank not in odd]
        raise ValueError(
            f"the ranks plan different things: rank(s) {_list(odd)} differ from rank(s) {_list(rest)}. {_SAME_ARGUMENTS}"
        )


def tell_refusal(group: dist.ProcessGroup | None) -> None:
    """What a rank calls that raises an error of its own instead of calling `assert_same_plan`, so that the others do not wait for it.

    Peers that do not come need not be told, and what is raised is this rank's own error: so a collective that fails is none here.
    """
    if group is not None and group_size(group) > 1:
        with suppress(CommTimeoutError):
            _gather_digests(_REFUSED, group)


def _gather_digests(own: bytes, group: dist.ProcessGroup) -> list[bytes]:
    row = torch.frombuffer(bytearray(own), dtype=torch.uint8).unsqueeze(0).to(group_device(group))
    gathered = gather_rows(row, [1] * group_size(group), group, label="comparison of plans")
    return [bytes(theirs) for theirs in gathered.cpu().tolist()]


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None, label: str) -> Tensor:
    if group_size(group) == 1:
        return x
    assert group is not None
    total = x.clone(memory_format=torch.contiguous_format)
    everyone = range(group_size(group))
    handed_over = total.view(total.shape)
    collective = partial(dist.all_reduce, handed_over, op=op, group=group, async_op=True)
    return Pending(start(collective, (handed_over,), group, label, everyone, everyone), lambda: total).wait()
