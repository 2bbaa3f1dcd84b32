"""Calls on DTensors, made on what each rank holds of them.

    heads    q, k, v on one 1-D mesh: equal shares of the heads on each rank, or all heads on every rank
    rows     x on a 1-D mesh: every rank has all rows, and all or some of the rest of their axes

Nothing here imports torch.distributed: everything needed is asked of the DTensors themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor

from magi_attention.common.forward_meta import AttnForwardMeta
from magi_attention.common.tensor_kinds import is_dtensor, is_plain, settled

P = ParamSpec("P")
Attention = Callable[P, tuple[Tensor, AttnForwardMeta]]

_INSTEAD = (
    "otherwise pass what to_local() of each gives and make DTensors of the results, as "
    "torch.distributed.tensor.experimental.local_map does"
)


def accepts_dtensors(
    check_mesh: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> Callable[[Attention[P]], Attention[P]]:
    """Let attention of ``(q, k, v, ..., sink)`` take tensors of wrapper subclasses as `settled` and `HeadShards` say.

    ``check_mesh``: given the DTensors' mesh and the arguments by name, raises a ValueError where they do not go together.
    """

    def decorate(attend: Attention[P]) -> Attention[P]:
        parameters = inspect.signature(attend).parameters
        names = tuple(parameters)
        num_positional = sum(one.kind is not one.KEYWORD_ONLY for one in parameters.values())

        @functools.wraps(attend)
        def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, AttnForwardMeta]:
            if is_plain(*args, *kwargs.values()):
                return attend(*args, **kwargs)
            by_position = names[: len(args)]
            if len(args) > num_positional or any((name in by_position) == (name in kwargs) for name in ("q", "k", "v")):
                return attend(*args, **kwargs)  # which Python refuses
            args = tuple(settled(names[at] if at < len(names) else "an argument", x) for at, x in enumerate(args))  # type: ignore[assignment]
            kwargs = {name: settled(name, x) for name, x in kwargs.items()}  # type: ignore[assignment]
            if not any(is_dtensor(x) for x in (*args, *kwargs.values())):
                return attend(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            shards = HeadShards.of(given)
            if check_mesh is not None:
                check_mesh(shards.mesh, given)
            return shards.rejoin(*attend(**shards.local(given)))  # type: ignore[call-arg]

        return call

    return decorate


@dataclass(frozen=True)
class HeadShards:
    """Where the heads of DTensors are. ``placement``: Shard(1) or Replicate(), of q, k and v. ``kind``: the class DTensor."""

    mesh: Any
    placement: Any
    kind: Any

    @staticmethod
    def of(given: Mapping[str, Any]) -> HeadShards:
        """ValueError: q, k, v and the sink are not placed as `accepts_dtensors` takes them."""
        q, k, v = (given[name] for name in ("q", "k", "v"))
        others = [name for name, x in given.items() if is_dtensor(x) and name not in ("q", "k", "v", "sink")]
        if others:
            raise ValueError(
                f"{others[0]} must be a plain tensor, the same on every rank, got a DTensor; pass its to_local()"
            )
        alike = all(
            is_dtensor(x) and x.device_mesh == q.device_mesh and x.placements == q.placements for x in (q, k, v)
        )
        if (
            not alike
            or q.device_mesh.ndim != 1
            or not (_is_shard(q.placements[0], 1) or q.placements[0].is_replicate())
        ):
            got = ", ".join(f"{name} {_describe(x)}" for name, x in (("q", q), ("k", k), ("v", v)))
            raise ValueError(
                f"q, k and v must be DTensors on one 1-D mesh, all Shard(1) (their heads) or all Replicate(), got {got}; {_INSTEAD}"
            )
        shards = HeadShards(q.device_mesh, q.placements[0], type(q))
        for name, x in (("q", q), ("k", k), ("v", v)):
            if shards.is_sharded and (x.dim() != 3 or x.shape[1] % shards.mesh.size()):
                raise ValueError(
                    f"{name} must have 3 axes and a number of heads that {shards.mesh.size()} ranks share evenly, got {list(x.shape)}; "
                    "repeat the heads of k and v, or use fewer ranks"
                )
        shards._check_sink(given.get("sink"))
        return shards

    @property
    def is_sharded(self) -> bool:
        return bool(self.placement.is_shard())

    def _check_sink(self, sink: Any) -> None:
        if sink is None:
            return
        fits = is_dtensor(sink) and sink.device_mesh == self.mesh and sink.dim() > 0
        if not fits or not (sink.placements[0].is_replicate() or (self.is_sharded and self._shares_heads(sink))):
            wanted = f"Shard({sink.dim() - 1}) (its heads) or Replicate()" if self.is_sharded else "Replicate()"
            raise ValueError(
                f"the sink must be a DTensor on the mesh of q, k and v, {wanted}, got {_describe(sink)}; {_INSTEAD}"
            )

    def _shares_heads(self, sink: Any) -> bool:
        return _is_shard(sink.placements[0], sink.dim() - 1) and sink.shape[-1] % self.mesh.size() == 0

    def local(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with what this rank holds of q, k, v and the sink."""
        result = dict(given)
        for name in ("q", "k", "v"):
            result[name] = settled(name, given[name].to_local())
        sink = given.get("sink")
        if sink is not None:
            if self.is_sharded and sink.placements[0].is_replicate():
                sink = sink.redistribute(self.mesh, [type(self.placement)(sink.dim() - 1)])
            result["sink"] = settled("sink", sink.to_local())
        return result

    def rejoin(self, out: Tensor, meta: AttnForwardMeta) -> tuple[Tensor, AttnForwardMeta]:
        """DTensors of what each rank computed: ``out`` and ``lse`` placed as q, ``max_logits`` over its heads."""
        lse, max_logits = meta.lse, meta.max_logits
        return self._wrap(out, 1), AttnForwardMeta(
            lse=None if lse is None else self._wrap(lse, 1),
            max_logits=None if max_logits is None else self._wrap(max_logits, 0),
        )

    def _wrap(self, x: Tensor, axis: int) -> Tensor:
        placement = type(self.placement)(axis) if self.is_sharded else self.placement
        result: Tensor = self.kind.from_local(x, self.mesh, [placement], run_check=False)
        return result


def move_rows(x: Any, move: Callable[[Tensor], Tensor], check_mesh: Callable[[Any], None]) -> Tensor:
    """``move``, which takes rows of any width and gives others of that width, on a DTensor.

    Raises:
        ValueError: ``x`` is not on a 1-D mesh, Replicate() or sharded along another axis than its rows.
    """
    mesh, placement = x.device_mesh, x.placements[0]
    is_split = any(_is_shard(placement, axis) for axis in range(1, x.dim()))
    if mesh.ndim != 1 or not (placement.is_replicate() or is_split):
        raise ValueError(
            "rows of a DTensor are moved where it is on a 1-D mesh, Replicate() or Shard(axis) along another axis than that of its "
            f"tokens, got {_describe(x)}; {_INSTEAD}"
        )
    check_mesh(mesh)
    moved = move(settled("x", x.to_local()))
    shape = (moved.shape[0], *x.shape[1:])
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    result: Tensor = type(x).from_local(
        moved, mesh, x.placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
    return result


def _is_shard(placement: Any, axis: int) -> bool:
    """Whether it is plain Shard(axis): subclasses lay rows out in other orders."""
    return type(placement).__name__ == "Shard" and placement.dim == axis


def _describe(x: Any) -> str:
    if is_dtensor(x):
        return f"{tuple(x.placements)} on a {x.device_mesh.ndim}-D mesh of {x.device_mesh.size()} ranks"
    return f"a plain tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
