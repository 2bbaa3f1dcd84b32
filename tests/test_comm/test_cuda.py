"""Rows that live on GPUs: over NCCL with a GPU for each rank, and over gloo, which carries them through the CPU, on any number of GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from comm_cases import delivered, exchange_of_rank, random_exchanges, random_rows

from magi_attention.comm import (
    all_reduce_max,
    assert_same_plan,
    gather_rows,
    group_cast,
    group_reduce,
    reduce_scatter_rows,
)
from magi_attention.testing.dist import shared_pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def exchange_on_gpu(backend: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    group = dist.new_group(backend=backend)
    assert_same_plan(b"the same on every rank", group)
    for seed in range(6):
        num_rows, sent = random_exchanges(seed, size)
        exchange = exchange_of_rank(sent, rank)
        ks, vs = (random_rows(seed + n, num_rows, 2, 3 + n, dtype=torch.bfloat16) for n in range(2))
        k, v = ks[rank].to(device), vs[rank].to(device)
        got_k, got_v = group_cast((k, v), exchange, group).wait()
        assert got_k.device == got_v.device == device
        assert torch.equal(got_k.cpu(), delivered(ks, sent, rank)) and torch.equal(
            got_v.cpu(), delivered(vs, sent, rank)
        )

        sums = [torch.zeros(k.shape, device=device) for _ in range(2)]
        for total in sums:
            group_reduce((got_k,), (total,), exchange, group).wait()
        copies = torch.zeros(num_rows[rank])
        for by_target in sent[rank]:
            copies[torch.from_numpy(by_target)] += 1
        torch.testing.assert_close(sums[0].cpu(), ks[rank].float() * copies[:, None, None], rtol=1e-6, atol=1e-6)
        assert torch.equal(sums[0], sums[1])

        whole = gather_rows(k, num_rows, group)
        assert torch.equal(whole.cpu(), torch.cat(ks))
        summed = reduce_scatter_rows(whole, num_rows, group)
        assert torch.equal(summed, (k.float() * size).to(torch.bfloat16))
    assert all_reduce_max(torch.full((2,), float(rank), device=device), group).tolist() == [size - 1.0] * 2


def test_rows_on_gpus_travel_over_gloo() -> None:
    shared_pool().run(exchange_on_gpu, "gloo", num_ranks=4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
def test_rows_on_gpus_travel_over_nccl() -> None:
    shared_pool().run(exchange_on_gpu, "nccl", num_ranks=min(torch.cuda.device_count(), 4))


# Rank 1 stays away from an exchange; rank 0 waits for the GPU that waits for it.
_STAY_AWAY = """
import datetime, os, time
import numpy as np
import torch
import torch.distributed as dist
from magi_attention.comm import all_reduce_max, group_cast
from magi_attention.plan import Exchange

rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=8))
x = torch.ones(1, 8, device="cuda")
all_reduce_max(x, dist.group.WORLD)
if rank == 0:
    splits = (0, 1)
    group_cast((x,), Exchange(np.array([[0, 1]]), splits, splits), dist.group.WORLD, label="k/v of stage 0").wait()
    torch.cuda.synchronize()
else:
    time.sleep(30)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
def test_who_stays_away_from_nccl_is_named_and_the_wait_ends(tmp_path: Path) -> None:
    script = tmp_path / "stay_away.py"
    script.write_text(_STAY_AWAY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode != 0
    assert "about to give up: collective #1 (k/v of stage 0)" in ended.stderr, ended.stderr
    assert "No word from rank 1:" in ended.stderr
