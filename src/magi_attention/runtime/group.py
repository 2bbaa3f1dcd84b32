"""From what a user calls a group to a process group: nothing, a ProcessGroup, or a 1-D or 2-D DeviceMesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_flat_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def resolve_group(cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group over which a sequence is spread; None is one rank without torch.distributed.

    A 2-D mesh (inter-node x intra-node) gives the group of all its ranks. Where that is not the default group it is made on first
    use, which every rank of the mesh must reach.

    Raises:
        ValueError: another kind of value, a mesh of more axes, or a group without torch.distributed being initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        if cp_group_or_mesh is None:
            return None
        raise ValueError(
            f"cp_group_or_mesh is {cp_group_or_mesh!r}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or leave cp_group_or_mesh out to run on one rank"
        )
    if cp_group_or_mesh is None:
        return dist.group.WORLD
    if isinstance(cp_group_or_mesh, dist.ProcessGroup):
        return cp_group_or_mesh
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(cp_group_or_mesh, DeviceMesh) and cp_group_or_mesh.ndim in (1, 2):
        return cp_group_or_mesh.get_group() if cp_group_or_mesh.ndim == 1 else _flat_group(cp_group_or_mesh)
    raise ValueError(
        f"cp_group_or_mesh must be a ProcessGroup, a 1-D or 2-D DeviceMesh or None, got {cp_group_or_mesh!r}; of a mesh with more "
        "axes, pass the slice over which the sequence is spread, such as mesh['cp']"
    )


def _flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = dist.group.WORLD
    assert world is not None
    if ranks == tuple(range(dist.get_world_size())):
        return world
    if ranks not in _flat_groups:
        _flat_groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _flat_groups[ranks]


def nodes_of(cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> int:
    """Ranks of a node of a 2-D mesh (inter-node x intra-node).

    Raises:
        ValueError: no 2-D mesh, or one whose ranks are not numbered node by node.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(cp_group_or_mesh, DeviceMesh) or cp_group_or_mesh.ndim != 2:
        raise ValueError(
            "hierarchical communication (MAGI_ATTENTION_HIERARCHICAL_COMM) needs to know which ranks share a node: pass a 2-D DeviceMesh "
            f"(inter-node x intra-node) as cp_group_or_mesh, got {cp_group_or_mesh!r}; or unset the variable"
        )
    ranks = cp_group_or_mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(
            f"the ranks of a 2-D mesh must be numbered node by node, ascending, got {cp_group_or_mesh.mesh.tolist()}"
        )
    return int(cp_group_or_mesh.mesh.shape[1])


def group_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor made for this group's user belongs: the current GPU for NCCL, else the CPU."""
    if group is not None and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
