"""Does a function attend exactly what a mask says? Perturb tokens, follow gradients, and compare with the mask.

Attention ``fn(q, k, v)``, for a probed key ``j`` and a probed query ``i``:

    changed               outputs that must change                         outputs that must not, to the last bit
    v[j]                  of queries that attend j                         all others
    k[j]                  of queries that attend j and another key         all others
    q[i]                  i's own, where it attends two keys or more       all others
    gradient of out[i]    must reach v[j], k[j] of the same cells, q[i]    and nothing else

Where a query attends one key alone, its k and q cancel out but for rounding: they may have an effect, and need not.

A model ``fn(x)`` of ``num_layers`` layers with residual connections mixes tokens once a layer: what may reach what is the mask, or
staying, that often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magi_attention.mask import AttnMask
from magi_attention.mask.bands import expand

Flags = NDArray[np.bool_]

_MOST_LINES_PRINTED = 12


@dataclass(frozen=True)
class Finding:
    """One wrong dependence. ``kind``: "leak" (it is there and must not be), "missing" (it must be and is not) or "not finite".

    ``source``: what was changed, or what a gradient reached, such as ``("v", 7)``; ``output``: the row of the output.
    """

    kind: str
    by: str
    source: tuple[str, int]
    output: int

    def __str__(self) -> str:
        return _in_words([self])


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. ``num_probes``: keys and queries probed; ``num_pairs``: dependences compared with the mask."""

    mask: AttnMask
    num_probes: int
    num_pairs: int
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.findings

    def check(self) -> None:
        """AssertionError with the findings, if there are any."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        mask = self.mask
        head = (
            f"audit of {mask.num_q:,} queries x {mask.num_k:,} keys: {self.num_probes:,} tokens probed, "
            f"{self.num_pairs:,} dependences compared"
        )
        if self.ok:
            return f"{head}: exactly the permitted ones are there"
        groups = _neighbours(self.findings)
        shown = [f"  {_in_words(group)}" for group in groups[:_MOST_LINES_PRINTED]]
        more = sum(len(group) for group in groups[_MOST_LINES_PRINTED:])
        return "\n".join(
            [f"{head}: {len(self.findings):,} are wrong", *shown, *([f"  and {more:,} more"] if more else [])]
        )


def _neighbours(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings that differ only in the row that was compared, and follow each other, together."""
    groups: list[list[Finding]] = []
    for one in findings:
        last = groups[-1][-1] if groups else None
        further = 0 if last is None else one.output - last.output, 0 if last is None else one.source[1] - last.source[1]
        alike = last is not None and (one.kind, one.by, one.source[0]) == (last.kind, last.by, last.source[0])
        if alike and further == ((1, 0) if one.by == "perturbation" else (0, 1)):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _in_words(group: Sequence[Finding]) -> str:
    """Such findings in one sentence, rows as slices: ``leak: v[3] changes out[7:9]``."""
    first, last = group[0], group[-1]
    output = _rows("out", first.output, last.output)
    if first.kind == "not finite":
        return f"{output} is not finite"
    verb = {
        ("leak", "perturbation"): "changes",
        ("leak", "gradient"): "gets a gradient from",
        ("missing", "perturbation"): "does not change",
        ("missing", "gradient"): "gets no gradient from",
    }[first.kind, first.by]
    return f"{first.kind}: {_rows(first.source[0], first.source[1], last.source[1])} {verb} {output}"


def _rows(name: str, first: int, last: int) -> str:
    return f"{name}[{first}]" if first == last else f"{name}[{first}:{last + 1}]"


def audit_mask(
    fn: Callable[..., Any],
    mask: AttnMask,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    num_layers: int | None = None,
    max_probes: int = 128,
    seed: int = 0,
) -> AuditReport:
    """Compare what a function's outputs depend on with what a mask permits.

    Args:
        fn: attention ``fn(q, k, v) -> out`` (or a tuple that begins with it); or, with ``num_layers``, a model ``fn(x) -> y``. It has to
            be deterministic and differentiable once, and to work on the dtype of the inputs.
        inputs: ``(q, k, v)``, tokens first; or ``x`` ``[num_tokens, ...]``. Left out: random float64, 2 heads of 16; x of 32.
        num_layers: how often the model attends, each time adding to what a token has (residual connections). None: ``fn`` is attention.
        max_probes: tokens probed on each side; all if there are no more, else those at the edges of the mask's rows first, then
            others at random.
        seed: of the inputs, the perturbations and the choice of tokens.

    Outputs that must not change are compared bit for bit. Random inputs in float64 leave no doubt about those that must; in low
    precision a small probability may round away and be reported as missing. What is no dependence is not seen: positions that count on
    from one document to the next, say.

    Raises:
        ValueError: inputs or outputs whose first axis is not the mask's lengths, or a mask with ``num_q != num_k`` for a model.
    """
    generator = torch.Generator().manual_seed(seed)
    audit = _Audit(fn, mask, num_layers, _inputs_for(mask, inputs, num_layers, generator), generator)
    rng = np.random.default_rng(seed)
    keys = _probes(mask.bands[:, 2:4], mask.num_k, max_probes, rng)
    queries = _probes(mask.bands[:, :2], mask.num_q, max_probes, rng)
    audit.perturb(keys, queries)
    audit.differentiate(queries)
    return AuditReport(mask, len(keys) + len(queries), audit.num_pairs, tuple(audit.findings))


class _Audit:
    """The work of one audit: outputs compared with and without a change, gradients followed."""

    def __init__(
        self,
        fn: Callable[..., Any],
        mask: AttnMask,
        num_layers: int | None,
        inputs: dict[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        self.fn, self.mask, self.num_layers, self.inputs, self.generator = fn, mask, num_layers, inputs, generator
        self.findings: list[Finding] = []
        self.num_pairs = 0
        self.base = self.run(inputs).detach()
        if self.base.shape[0] != mask.num_q:
            raise ValueError(
                f"the function must return one row for each of the {mask.num_q} queries, got shape {list(self.base.shape)}"
            )
        broken = (~torch.isfinite(self.base)).flatten(1).any(dim=1).cpu().numpy()
        self.findings += [Finding("not finite", "perturbation", ("", -1), int(at)) for at in np.flatnonzero(broken)]
        self.attended, self.keys_of = _dependence(mask), _num_keys(mask)

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        out = self.fn(*inputs.values())
        result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return result

    def perturb(self, keys: NDArray[np.int64], queries: NDArray[np.int64]) -> None:
        """Change one token at a time, and see which outputs change."""
        if self.num_layers is not None:
            for token in np.union1d(keys, queries):
                reached = self.reached(int(token), forward=True)
                self.compare("perturbation", "x", int(token), self.changed_by("x", int(token)), reached)
            return
        several = self.keys_of > 1
        for key in keys:
            sees = self.attended.column(int(key))
            self.compare("perturbation", "v", int(key), self.changed_by("v", int(key)), sees)
            self.compare("perturbation", "k", int(key), self.changed_by("k", int(key)), sees, sees & several)
        for query in queries:
            own = np.arange(self.mask.num_q) == query
            self.compare("perturbation", "q", int(query), self.changed_by("q", int(query)), own, own & several)

    def changed_by(self, name: str, at: int) -> Flags:
        """``[num_q]``: the outputs that are not the same bits once one token of an input is another."""
        changed = self.inputs[name].clone()
        changed[at] = _another(changed, at, self.generator)
        out = self.run({**self.inputs, name: changed}).detach()
        same = (out == self.base) | (out.isnan() & self.base.isnan())
        flags: Flags = (~same).flatten(1).any(dim=1).cpu().numpy()
        return flags

    def differentiate(self, queries: NDArray[np.int64]) -> None:
        """Send a gradient into one output at a time, and see which inputs it reaches."""
        leaves = {name: value.detach().clone() for name, value in self.inputs.items()}
        if not all(value.is_floating_point() for value in leaves.values()):
            return  # ids of tokens have no gradient
        for value in leaves.values():
            value.requires_grad_()
        out = self.run(leaves)
        for query in queries:
            seed = torch.zeros_like(out)
            noise = torch.randn(out[int(query)].shape, generator=self.generator, dtype=torch.float64)
            seed[int(query)] = noise.to(out.device, out.dtype)
            found = torch.autograd.grad(out, list(leaves.values()), seed, retain_graph=True, allow_unused=True)
            grads = {name: _is_reached(grad, leaves[name]) for name, grad in zip(leaves, found, strict=True)}
            self.follow(int(query), grads)

    def follow(self, query: int, grads: dict[str, Flags]) -> None:
        """Compare what one output's gradient reached with what it may reach."""
        if self.num_layers is not None:
            reached = self.reached(query, forward=False)
            self.compare("gradient", "x", query, grads["x"], reached)
            return
        sees, several = self.attended.row(query), self.keys_of[query] > 1
        self.compare("gradient", "v", query, grads["v"], sees)
        self.compare("gradient", "k", query, grads["k"], sees, sees & several)
        own = np.arange(self.mask.num_q) == query
        self.compare("gradient", "q", query, grads["q"], own, own & several)

    def compare(self, by: str, name: str, at: int, found: Flags, may: Flags, must: Flags | None = None) -> None:
        """Note every dependence that is there and may not be, or is not there and must be (left out: all that may)."""
        self.num_pairs += len(found)
        for kind, wrong in (("leak", found & ~may), ("missing", (may if must is None else must) & ~found)):
            for other in np.flatnonzero(wrong).tolist():
                source, output = (at, other) if by == "perturbation" else (other, at)
                self.findings.append(Finding(kind, by, (name, source), output))

    def reached(self, token: int, forward: bool) -> Flags:
        """What one token reaches in all layers (``forward``), or is reached from."""
        flags: Flags = np.arange(self.mask.num_q) == token
        for _ in range(self.num_layers or 0):
            flags = flags | (self.attended.any_in(flags) if forward else self.attended.any_from(flags))
        return flags


@dataclass(frozen=True, eq=False)
class _Dependence:
    """A mask's cells as ranges of keys, one for each query of each row: ``query``, ``begin``, ``end`` ``[n]``."""

    num_q: int
    num_k: int
    query: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]

    def column(self, key: int) -> Flags:
        """``[num_q]``: who attends a key."""
        seen = np.zeros(self.num_q, bool)
        seen[self.query[(self.begin <= key) & (key < self.end)]] = True
        return seen

    def row(self, query: int) -> Flags:
        """``[num_k]``: what a query attends."""
        return self.any_from(np.arange(self.num_q) == query)

    def any_in(self, keys: Flags) -> Flags:
        """``[num_q]``: who attends any of some keys."""
        before = np.concatenate([[0], np.cumsum(keys)])
        seen = np.zeros(self.num_q, bool)
        seen[self.query[before[self.end] > before[self.begin]]] = True
        return seen

    def any_from(self, queries: Flags) -> Flags:
        """``[num_k]``: what any of some queries attends."""
        chosen = queries[self.query]
        steps = np.zeros(self.num_k + 1, np.int64)
        np.add.at(steps, self.begin[chosen], 1)
        np.add.at(steps, self.end[chosen], -1)
        flags: Flags = np.cumsum(steps)[:-1] > 0
        return flags


def _dependence(mask: AttnMask) -> _Dependence:
    q0, q1, _, _, _, _ = mask.bands.T
    row, query = expand(q0, q1 - q0)
    _, _, k0, k1, lo, hi = mask.bands[row].T
    begin, end = np.maximum(k0, query + lo), np.minimum(k1, query + hi + 1)
    return _Dependence(mask.num_q, mask.num_k, query, begin, end)


def _num_keys(mask: AttnMask) -> NDArray[np.int64]:
    """``[num_q]``: how many keys each query attends."""
    cells = _dependence(mask)
    count = np.zeros(mask.num_q, np.int64)
    np.add.at(count, cells.query, cells.end - cells.begin)
    return count


def _probes(ranges: NDArray[np.int64], length: int, most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Tokens to probe: all, or those on both sides of where rows begin and end, and others."""
    if length <= most:
        return np.arange(length)
    edges = np.unique(np.concatenate([ranges.ravel(), ranges.ravel() - 1, [0, length - 1]]))
    edges = edges[(edges >= 0) & (edges < length)]
    if len(edges) >= most:
        return np.sort(rng.choice(edges, most, replace=False))
    others = np.setdiff1d(np.arange(length), edges)
    return np.sort(np.concatenate([edges, rng.choice(others, most - len(edges), replace=False)]))


def _inputs_for(
    mask: AttnMask, inputs: Tensor | Sequence[Tensor] | None, num_layers: int | None, generator: torch.Generator
) -> dict[str, Tensor]:
    if num_layers is not None and mask.num_q != mask.num_k:
        raise ValueError(
            f"a model has as many queries as keys, but the mask has {mask.num_q} and {mask.num_k}; leave num_layers out to audit "
            "attention"
        )
    names = ("q", "k", "v") if num_layers is None else ("x",)
    lengths = dict(zip(names, (mask.num_q, mask.num_k, mask.num_k), strict=False))
    if inputs is None:
        shape = (2, 16) if num_layers is None else (32,)
        return {
            name: torch.randn(length, *shape, generator=generator, dtype=torch.float64)
            for name, length in lengths.items()
        }
    given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if len(given) != len(names) or any(x.shape[:1] != (lengths[name],) for name, x in zip(names, given, strict=False)):
        wanted = ", ".join(f"{name} of {length} tokens" for name, length in lengths.items())
        raise ValueError(f"inputs must be {wanted}, tokens first; got shapes {[list(x.shape) for x in given]}")
    return dict(zip(names, (x.detach() for x in given), strict=True))


def _another(values: Tensor, at: int, generator: torch.Generator) -> Tensor:
    """Another token in the place of one: noise on top of it, or of ids one that is elsewhere (or the next number)."""
    old = values[at]
    if old.is_floating_point():
        noise = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        return old + noise.to(old.device, old.dtype)
    others = values[values != old] if old.ndim == 0 else values.new_empty(0)
    return others[0] if len(others) else old + 1


def _is_reached(grad: Tensor | None, leaf: Tensor) -> Flags:
    if grad is None:
        return np.zeros(leaf.shape[0], bool)
    flags: Flags = (grad != 0).flatten(1).any(dim=1).cpu().numpy()  # NaN is not 0
    return flags
