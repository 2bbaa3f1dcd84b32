"""Joining torchrun's process group, or being one rank without it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from magi_attention.utils import clearup_dist_env, setup_dist_env

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "NNODES", "NPROC_PER_NODE")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    clearup_dist_env()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_one_rank_without_torchrun() -> None:
    rank, local_rank, world_size, num_nodes, num_local_ranks, group, device, seed = setup_dist_env(backend="gloo")
    assert (rank, local_rank, world_size, num_nodes, num_local_ranks, seed) == (0, 0, 1, 1, 1, None)
    assert group is dist.group.WORLD
    assert dist.get_backend() == "gloo"
    if not torch.cuda.is_available():
        assert device == torch.device("cpu")
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [1, 1, 1]
    clearup_dist_env()
    assert not dist.is_initialized()
    clearup_dist_env()


def test_seed() -> None:
    *_, seed = setup_dist_env(backend="gloo", base_seed=5, seed_bias=lambda rank: rank + 2)
    assert seed == 7
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))


def test_variable_that_is_no_int(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be an int, as torchrun sets it, got 'two'"):
        setup_dist_env()


def test_ranks_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 ranks .* need MASTER_ADDR .* torchrun"):
        setup_dist_env()


def test_under_torchrun() -> None:
    """Two ranks of one node: what each is told, and that they meet."""
    program = (
        "import os, torch, torch.distributed as dist\n"
        "from magi_attention.utils import setup_dist_env, clearup_dist_env\n"
        "*told, group, device, seed = setup_dist_env('gloo', base_seed=1, seed_bias=lambda rank: 10 * rank)\n"
        "total = torch.tensor([told[0] + 1])\n"
        "dist.all_reduce(total, group=group)\n"
        # One write, so that the ranks' lines do not mix.
        "os.write(1, (' '.join(map(str, ('told', *told, seed, total.item()))) + '\\n').encode())\n"
        "clearup_dist_env()\n"
    )
    arguments = ["--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", program]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("told")) == [
        "told 0 0 2 1 2 1 3",
        "told 1 1 2 1 2 11 3",
    ]
