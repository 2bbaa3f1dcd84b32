"""From what a user calls a group to a process group: nothing, a ProcessGroup, or a 1-D or 2-D DeviceMesh."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from magi_attention.comm import all_reduce_max

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Dimensions of a mesh over which programs spread other things than the sequence.
_NOT_SEQUENCE = ("dp", "dp_replicate", "dp_shard", "fsdp", "tp", "pp", "ep")

# Groups of meshes, of the world that they were made in: a program may leave its process group and join another.
_flat_groups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()


def resolve_group(cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group over which a sequence is spread; None is one rank without torch.distributed.

    A 2-D mesh (inter-node x intra-node) gives the group of all its ranks. Where that is not the default group it is made on first
    use, which every rank of the mesh must reach.

    Raises:
        ValueError: another kind of value, a mesh of more axes or with an axis that is named for data, tensor, pipeline or expert
            parallelism, a group without torch.distributed being initialised, or one that this rank is not in.
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
    if cp_group_or_mesh is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_a_member(cp_group_or_mesh)
    if isinstance(cp_group_or_mesh, dist.ProcessGroup):
        return cp_group_or_mesh
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(cp_group_or_mesh, DeviceMesh):
        _check_axes(cp_group_or_mesh)
    if isinstance(cp_group_or_mesh, DeviceMesh) and cp_group_or_mesh.ndim in (1, 2):
        if cp_group_or_mesh.get_coordinate() is None:
            raise _not_a_member(cp_group_or_mesh)
        return cp_group_or_mesh.get_group() if cp_group_or_mesh.ndim == 1 else _flat_group(cp_group_or_mesh)
    raise ValueError(
        f"cp_group_or_mesh must be a ProcessGroup, a 1-D or 2-D DeviceMesh or None, got {cp_group_or_mesh!r}; of a mesh with more "
        "axes, pass the slice over which the sequence is spread, such as mesh['cp']"
    )


def mesh_of(cp_group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> DeviceMesh | None:
    """The mesh, where one is passed."""
    return None if cp_group_or_mesh is None or isinstance(cp_group_or_mesh, dist.ProcessGroup) else cp_group_or_mesh


def _check_axes(mesh: DeviceMesh) -> None:
    """ValueError where the names of the mesh's axes say that its ranks do not all share one sequence."""
    names = mesh.mesh_dim_names or ()
    others = [name for name in names if name in _NOT_SEQUENCE]
    if others:
        left = ", ".join(repr(name) for name in names if name not in _NOT_SEQUENCE)
        submesh = f"mesh[{left}]" if left else "mesh['cp'] of the mesh that this one is part of"
        raise ValueError(
            f"cp_group_or_mesh must be a mesh over whose ranks one sequence is spread, got one with the axes {names}, of which "
            f"{', '.join(others)} spread other things; pass the submesh for the sequence, such as {submesh}"
        )


def _not_a_member(group: object) -> ValueError:
    return ValueError(
        f"rank {dist.get_rank()} is not in the cp_group_or_mesh that it was given ({group!r}); only the ranks of a group make its keys"
    )


def _flat_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = dist.group.WORLD
    assert world is not None
    if ranks == tuple(range(dist.get_world_size())):
        return world
    groups = _flat_groups.setdefault(world, {})
    if ranks not in groups:
        _check_same_number_of_groups(mesh)
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]


def _check_same_number_of_groups(mesh: DeviceMesh) -> None:
    """ValueError, on every rank of the mesh, where its ranks are in different numbers of groups.

    After that number torch names a group that only its members make, so where it differs they would wait for each other without end.
    """
    number = len(c10d._world.pg_names)
    both = torch.tensor([number, -number], device=group_device(mesh.get_group(0)))
    for axis in range(mesh.ndim):
        both = all_reduce_max(both, mesh.get_group(axis), label="number of groups")
    most, least = both.tolist()
    if most != -least:
        raise ValueError(
            f"the ranks {mesh.mesh.tolist()} of this 2-D mesh are in {-least} to {most} process groups each, and torch cannot make a "
            "group of all of them unless they are in equally many: make the first key of this mesh before the groups that only some of "
            "them are in"
        )


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
