"""Process groups as torchrun's environment describes them. Kept for programs already written."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.env import launcher_has_address, launcher_int

# Gloo's threads release the last collective's tensors a moment after its wait, and need the interpreter for it. A program that ends
# right after `clearup_dist_env` leaves them no interpreter, and aborts. Nothing tells when they have released tensors that other code sent.
SECONDS_FOR_GLOO = 0.2


def setup_dist_env(
    backend: str | None = None,
    base_seed: int | None = None,
    seed_bias: Callable[[int], int] = lambda rank: 0,
) -> tuple[int, int, int, int, int, dist.ProcessGroup, int | torch.device, int | None]:
    """Join the default process group of the processes that torchrun started; without torchrun, of this process alone.

    Args:
        backend: of torch.distributed; omitted, "nccl" where there is a GPU, "gloo" otherwise.
        base_seed: seeds Python's, numpy's and torch's random numbers with ``base_seed + seed_bias(rank)``; omitted, none is seeded.
        seed_bias: what a rank adds to the seed; omitted, nothing, so that all ranks draw the same numbers.

    Returns:
        ``(rank, local_rank, world_size, num_nodes, num_local_ranks, world_group, device, seed)``. ``device`` is the index of the
        current GPU, which is set to ``local_rank``, or the CPU. ``seed`` is None without ``base_seed``.

    Raises:
        ValueError: a variable of torchrun's that is no int, or ranks without an address to meet at.
    """
    rank, local_rank = launcher_int("RANK", default=0), launcher_int("LOCAL_RANK", default=0)
    world_size = launcher_int("WORLD_SIZE", default=1)
    # torchrun sets the first of each; scripts that start ranks by themselves often set the second.
    num_nodes = launcher_int("GROUP_WORLD_SIZE", "NNODES", default=1)
    num_local_ranks = launcher_int("LOCAL_WORLD_SIZE", "NPROC_PER_NODE", default=max(1, world_size // num_nodes))

    device: int | torch.device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.cuda.current_device()
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if launcher_has_address():
        dist.init_process_group(backend=backend, rank=rank, world_size=world_size)
    elif world_size == 1:
        dist.init_process_group(backend=backend, rank=0, world_size=1, store=dist.HashStore())
    else:
        raise ValueError(
            f"{world_size} ranks (WORLD_SIZE) need MASTER_ADDR and MASTER_PORT in order to meet, and MASTER_ADDR is not set; "
            "start them with torchrun"
        )
    seed = None
    if base_seed is not None:
        seed = base_seed + seed_bias(rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    world_group = dist.group.WORLD
    assert world_group is not None
    return rank, local_rank, world_size, num_nodes, num_local_ranks, world_group, device, seed


def clearup_dist_env() -> None:
    """Leave the default process group, and all others; nothing where there is none. Takes a fifth of a second with gloo."""
    if dist.is_initialized():
        has_gloo_threads = "gloo" in dist.get_backend_config()
        dist.destroy_process_group()
        if has_gloo_threads:
            time.sleep(SECONDS_FOR_GLOO)
