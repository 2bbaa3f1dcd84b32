"""flex_flash_attn_func under torch.compile: one graph without a break, and what comes of it is what eager gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from magi_attention.functional import flex_flash_attn_func, ops
from magi_attention.functional.ops import flex_flash_attn, flex_flash_attn_backward, forward_operator

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


class Layer(nn.Module):
    """Projections, attention with sinks, a residual."""

    def __init__(self, layout: str, num_tokens: int, **options: Any) -> None:
        super().__init__()
        width, shape = HEADS * HEAD_DIM, (2, HEADS) if layout == "sh" else (num_tokens, 2, HEADS)
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.sink = nn.Parameter(torch.randn(shape))
        self.options = {**options, "sink_layout": layout}

    def forward(self, x: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out, meta = flex_flash_attn_func(q, k, v, *tables, sink=self.sink, **self.options)
        return x + out.flatten(1), meta.max_logits


def tables(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    cut = num_tokens // 3
    ranges = torch.tensor([[0, cut], [cut, num_tokens]], dtype=torch.int32)
    return ranges, ranges, torch.tensor([1, 0], dtype=torch.int32)


def differentiate(run: Any, layer: Layer, num_tokens: int) -> list[Tensor]:
    """The output, the gradient of every parameter and of the input, and what else is returned."""
    x = torch.randn(num_tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, max_logits = run(x, *tables(num_tokens))
    grads = torch.autograd.grad(out.square().mean(), [x, *layer.parameters()])
    return [out.detach(), *grads, *([] if max_logits is None else [max_logits])]


def assert_compiles(layer: Layer, lengths: tuple[int, ...], backend: str, dynamic: bool | None = None) -> None:
    torch._dynamo.reset()
    counter, compiled_first = CompileCounterWithBackend(backend), 0
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    for num_tokens in lengths:
        expected, actual = (differentiate(run, layer, num_tokens) for run in (layer, compiled))
        for x, y in zip(expected, actual, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        compiled_first = compiled_first or counter.frame_count
    assert counter.frame_count == compiled_first > 0, "compiled again for another length"


@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "return_max_logits": True, "softmax_scale": 0.3}])
def test_one_graph(layout: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_compiles(Layer(layout, 45, **options), (45,), "aot_eager")


def test_one_graph_for_all_lengths() -> None:
    torch.manual_seed(0)
    assert_compiles(Layer("sh", 45, return_max_logits=True), (45, 70, 33), "aot_eager", dynamic=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what inductor imports
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.long), True])
def test_inductor(dynamic: bool) -> None:
    torch.manual_seed(0)
    assert_compiles(Layer("sh", 45, softcap=5.0), (45, 70) if dynamic else (45,), "inductor", dynamic)


@pytest.mark.parametrize("backend", ["cpu", "reference", "tiled"])
def test_the_backend_is_picked_when_it_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", backend)
    assert_compiles(Layer("sh", 45), (45,), "aot_eager")


def test_errors_under_compile() -> None:
    layer = Layer("sh", 45)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(45, HEADS * HEAD_DIM)
    q_ranges, k_ranges, types = tables(45)
    with pytest.raises(ValueError, match=r"q_ranges\[1\] must satisfy .* got \[15, 46\)"):
        compiled(x, q_ranges + torch.tensor([[0, 0], [0, 1]], dtype=torch.int32), k_ranges, types)


@pytest.mark.parametrize("with_sink", [False, True])
def test_the_operators_keep_torchs_rules(with_sink: bool) -> None:
    """Schema, fake results (shapes, dtypes, strides), gradients, dynamic shapes: torch's own checks of an operator."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    q = normal(HEADS, 21, 16).detach().transpose(0, 1).requires_grad_()
    k, v = normal(21, KV_HEADS, 16), normal(21, KV_HEADS, 8)
    sink = normal(2, HEADS) if with_sink else None
    mask, options = tables(21), (sink, "sh", 0.25, 0.0, False)
    torch.library.opcheck(forward_operator, (q, k, v, *mask, *options, with_sink, ops.GRADIENT_VERSION))
    with torch.no_grad():
        out, lse, _ = flex_flash_attn(q, k, v, *mask, *options, False)
    dout, *values = [x.detach() for x in (torch.randn(out.shape), q, k, v, out, lse)]
    options = (None if sink is None else sink.detach(), *options[1:])
    for dlse in (None, torch.randn(lse.shape)):
        torch.library.opcheck(flex_flash_attn_backward, (dout, dlse, *values, *mask, *options))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out": lambda out, lse: out.square().mean(),
    "lse": lambda out, lse: lse.square().mean(),
    "both": lambda out, lse: out.square().mean() + lse.square().mean(),
}


@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("used", LOSSES)
def test_the_gradient_of_lse(used: str, layout: str) -> None:
    """With the loss in the graph, and outside it, where all that the graph returns has a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, HEADS, 16), (33, KV_HEADS, 16), (33, KV_HEADS, 8), (2, HEADS) if layout == "sh" else (33, 2, HEADS)]
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]

    def attend(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, meta = flex_flash_attn_func(*leaves[:3], *tables(33), sink=leaves[3], sink_layout=layout)
        assert meta.lse is not None
        return out, meta.lse

    def loss(*leaves: Tensor) -> Tensor:
        return LOSSES[used](*attend(*leaves))

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    inside = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outside = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for value in (inside(*leaves), LOSSES[used](*outside(*leaves))):
        torch.testing.assert_close(torch.autograd.grad(value, leaves), expected)


def test_graphs_on_disk_know_the_version_of_the_gradient() -> None:
    """By what a graph holds torch finds it again: a graph of another version must not be the same."""
    targets = []

    def look(graph: Any, _: Any) -> Any:
        targets.extend(node for node in graph.graph.nodes if "magi_attention" in str(node.target))
        return graph

    torch._dynamo.reset()
    torch.compile(Layer("sh", 45), fullgraph=True, backend=look)(torch.randn(45, HEADS * HEAD_DIM), *tables(45))
    assert [node.args[-1] for node in targets] == [ops.GRADIENT_VERSION]


def test_autocast() -> None:
    """float32 q and k beside a bfloat16 v, backward outside: the casts and bits of eager."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(45, heads, 16, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    leaves = [q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()]

    def attend(*leaves: Tensor) -> Tensor:
        return flex_flash_attn_func(*leaves, *tables(45))[0]

    torch._dynamo.reset()
    results = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.float().square().mean(), leaves)])
    assert [x.dtype for x in results[1]] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_checkpoints_can_keep_what_attention_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective checkpointing sees the operator, so a policy can keep its results instead of computing them again."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kept_op, calls = torch.ops.magi_attention.flex_flash_attn.default, []
    pick = ops.pick
    monkeypatch.setattr(ops, "pick", lambda *args, **kwargs: (calls.append(1), pick(*args, **kwargs))[1])

    def policy(keep: bool, function: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keep and function is kept_op else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    layer = Layer("sh", 45)
    expected = differentiate(layer, layer, 45)
    for keep, num_calls in ((True, 2), (False, 3)):
        contexts = partial(create_selective_checkpoint_contexts, lambda _, f, *a, keep=keep, **k: policy(keep, f))
        calls.clear()
        actual = differentiate(partial(checkpoint, layer, use_reentrant=False, context_fn=contexts), layer, 45)
        assert all(torch.equal(x, y) for x, y in zip(expected, actual, strict=True))
        assert len(calls) == num_calls


_FIRST_CALL = """
import sys
import torch
from magi_attention.functional import flex_flash_attn_func
x, ranges = torch.randn(8, 1, 16, requires_grad=True), torch.tensor([[0, 8]], dtype=torch.int32)
flex_flash_attn_func(x, x, x, ranges, ranges)[0].sum().backward()
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


def test_a_call_that_is_not_compiled_imports_no_compiler() -> None:
    """Which takes a second, once in every process."""
    answer = subprocess.run([sys.executable, "-c", _FIRST_CALL], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"
