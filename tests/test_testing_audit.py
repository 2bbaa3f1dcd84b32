"""The audit passes what is right and catches each planted leak, with its place."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.cli import main
from magi_attention.functional import flex_flash_attn_func
from magi_attention.mask import AttnMask
from magi_attention.testing.audit import AuditReport, Finding, audit_mask

MASKS = {
    "causal": AttnMask.causal(14),
    "documents": AttnMask.varlen([0, 5, 6, 14], causal=True),
    "window": AttnMask.sliding_window(14, (3, 1)),
    "prefix": AttnMask.shared_prefix([4, 5, 5], [-1, 0, 0]),
    "cross": AttnMask.cross_attention([0, 4, 9], [0, 6, 8]),
    "empty queries": AttnMask.from_slices([(2, 6), (8, 12)], [(0, 5), (4, 9)], ["causal", "full"], 14, 10),
}


def attention(mask: AttnMask, attended: np.ndarray | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Plain attention over the mask's cells, or over others."""
    cells = torch.from_numpy(mask.to_dense() if attended is None else attended)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        some = cells.any(dim=1)
        logits = logits.masked_fill(~cells, -math.inf).masked_fill(~some[:, None], 0.0)
        probs = logits.softmax(dim=-1).masked_fill(~cells, 0.0)
        return torch.einsum("hqk,khd->qhd", probs, v)

    return attend


@pytest.mark.parametrize("name", MASKS)
def test_plain_attention_passes(name: str) -> None:
    report = audit_mask(attention(MASKS[name]), MASKS[name])
    report.check()
    assert report.num_probes == MASKS[name].num_q + MASKS[name].num_k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", MASKS)
def test_our_own_attention_passes(name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]
    slices = [torch.as_tensor(part, dtype=torch.int32) for part in mask.to_slices()]
    generator = torch.Generator().manual_seed(1)
    sizes = (mask.num_q, 4, 16), (mask.num_k, 2, 16), (mask.num_k, 2, 24)
    inputs = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    audit_mask(lambda q, k, v: flex_flash_attn_func(q, k, v, *slices), mask, inputs).check()


DOCUMENTS = MASKS["documents"]


def one_too_many(mask: AttnMask) -> Callable[..., Tensor]:
    """A diagonal that is off by one: each query sees the key behind its own."""
    return attention(mask, mask.to_dense() | np.eye(mask.num_q, k=1, dtype=bool))


def one_cell(mask: AttnMask) -> Callable[..., Tensor]:
    """One query of one document sees one key of another."""
    cells = mask.to_dense()
    cells[9, 4] = True
    return attention(mask, cells)


def only_discouraged(mask: AttnMask) -> Callable[..., Tensor]:
    """Forbidden logits get -20 in place of minus infinity."""
    bias = torch.from_numpy(np.where(mask.to_dense(), 0.0, -20.0))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + bias
        return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), v)

    return attend


def in_the_denominator(mask: AttnMask) -> Callable[..., Tensor]:
    """Probabilities are masked after the softmax: the forbidden keys carry no value, and still weigh."""
    cells = torch.from_numpy(mask.to_dense())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1) * cells, v)

    return attend


def in_the_backward(mask: AttnMask) -> Callable[..., Tensor]:
    """The forward is right; the backward is that of attention without a mask."""
    right, wrong = attention(mask), attention(mask, np.ones((mask.num_q, mask.num_k), bool))

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            return right(q, k, v)

        @staticmethod
        def backward(ctx: Any, *dout: Tensor) -> Any:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(wrong(*inputs), inputs, dout[0])

    return Attend.apply


def across_outputs(mask: AttnMask) -> Callable[..., Tensor]:
    """Attention is right, and what follows it centres all tokens together."""
    attend = attention(mask)

    def centred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        return out - 1e-6 * out.mean(dim=0)

    return centred


LEAKS = {
    "one too many": (one_too_many, Finding("leak", "perturbation", ("v", 1), 0)),
    "one cell": (one_cell, Finding("leak", "gradient", ("k", 4), 9)),
    "only discouraged": (only_discouraged, Finding("leak", "perturbation", ("v", 13), 0)),
    "in the denominator": (in_the_denominator, Finding("leak", "perturbation", ("k", 9), 0)),
    "in the backward": (in_the_backward, Finding("leak", "gradient", ("v", 13), 0)),
    "across outputs": (across_outputs, Finding("leak", "perturbation", ("q", 4), 13)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_caught(name: str) -> None:
    plant, expected = LEAKS[name]
    report = audit_mask(plant(DOCUMENTS), DOCUMENTS)
    assert expected in report.findings
    assert {finding.kind for finding in report.findings} == {"leak"}
    with pytest.raises(AssertionError, match="are wrong\n  leak: "):
        report.check()


@pytest.mark.parametrize("name", LEAKS)
def test_the_command_catches_each_planted_leak(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        sys.modules, "planted", SimpleNamespace(leak=LEAKS[name][0](DOCUMENTS), right=attention(DOCUMENTS))
    )
    (tmp_path / "mask.json").write_text(DOCUMENTS.to_json(), encoding="utf-8")
    asked = ["audit", "--mask", str(tmp_path / "mask.json"), "--function"]
    assert main([*asked, "planted:right"]) == 0
    assert main([*asked, "planted:leak"]) == 2
    assert "are wrong\n  leak: " in capsys.readouterr().err


def test_a_leak_in_the_backward_alone_shows_in_gradients_alone() -> None:
    report = audit_mask(in_the_backward(DOCUMENTS), DOCUMENTS)
    assert {finding.by for finding in report.findings} == {"gradient"}


def test_one_wrong_cell_is_all_that_is_found() -> None:
    report = audit_mask(one_cell(DOCUMENTS), DOCUMENTS)
    assert {(finding.source[1], finding.output) for finding in report.findings} == {(4, 9)}
    assert "leak: v[4] changes out[9]" in str(report)


def test_what_is_missing_is_found_too() -> None:
    cells = DOCUMENTS.to_dense()
    cells[8, 7] = False
    report = audit_mask(attention(DOCUMENTS, cells), DOCUMENTS)
    assert {(finding.kind, finding.source[1], finding.output) for finding in report.findings} == {("missing", 7, 8)}
    assert "missing: v[7] gets no gradient from out[8]" in str(report)


def test_outputs_that_are_not_finite_are_found() -> None:
    mask = MASKS["empty queries"]
    cells = torch.from_numpy(mask.to_dense())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~cells, -math.inf)
        return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), v)

    findings = audit_mask(attend, mask).findings
    empty = np.flatnonzero(~mask.to_dense().any(axis=1)).tolist()
    assert [finding.output for finding in findings if finding.kind == "not finite"] == empty


class Model(torch.nn.Module):
    """Layers of attention and MLPs with residual connections, float64."""

    def __init__(self, mask: AttnMask, num_layers: int, norm: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.norm = attention(mask), norm
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(32, 96, dtype=torch.float64) for _ in range(num_layers))
        self.mlp = torch.nn.ModuleList(torch.nn.Linear(32, 32, dtype=torch.float64) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(self.norm(x)).view(len(x), 3, 2, 16).unbind(dim=1)
            x = x + self.attend(q, k, v).flatten(1)
            x = x + torch.tanh(mlp(x))
        return x


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_models_reach_further_with_each_layer(num_layers: int) -> None:
    mask = MASKS["window"]
    audit_mask(Model(mask, num_layers), mask, num_layers=num_layers).check()
    if num_layers > 1:
        report = audit_mask(Model(mask, num_layers), mask, num_layers=num_layers - 1)
        assert {finding.kind for finding in report.findings} == {"leak"}


def test_a_norm_over_tokens_leaks() -> None:
    mask = DOCUMENTS
    report = audit_mask(Model(mask, 2, lambda x: x - x.mean(dim=0)), mask, num_layers=2)
    assert Finding("leak", "perturbation", ("x", 13), 0) in report.findings


class SmallModel(torch.nn.Module):
    """Token ids to logits, with this package's attention: positions, norms, MLPs, and what a leak may be planted in."""

    def __init__(
        self, mask: AttnMask, norm: Callable[[int], torch.nn.Module] = torch.nn.LayerNorm, look_ahead: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slices = [torch.as_tensor(part, dtype=torch.int32) for part in mask.to_slices()]
        self.tokens, self.positions = torch.nn.Embedding(50, 32), torch.nn.Embedding(mask.num_q, 32)
        self.norms = torch.nn.ModuleList(norm(32) for _ in range(2))
        self.mix = torch.nn.Conv1d(32, 32, 1 + look_ahead)
        self.look_ahead = look_ahead
        self.qkv, self.out, self.head = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32), torch.nn.Linear(32, 50)

    def place(self, ids: Tensor) -> Tensor:
        return torch.arange(len(ids))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(self.place(ids))
        y = torch.nn.functional.pad(self.norms[0](x).T, (0, self.look_ahead))
        q, k, v = self.qkv(self.mix(y).T).view(len(ids), 3, 2, 16).unbind(dim=1)
        out, _ = flex_flash_attn_func(q, k, v, *self.slices)
        return self.head(self.norms[1](x + self.out(out.flatten(1))))


class PlacedByContent(SmallModel):
    """A token's position is how many tokens like the first of all came before it."""

    def place(self, ids: Tensor) -> Tensor:
        return (ids == ids[0]).cumsum(0) % len(ids)


WITHOUT_DOCUMENTS = AttnMask.causal(14)
OFF_BY_ONE = AttnMask(np.array([[0, 14, 0, 14, -13, 1]]), 14, 14).intersection(AttnMask.varlen([0, 5, 6, 14]))
LEAKING_MODELS = {
    "batch norm": lambda: SmallModel(DOCUMENTS, torch.nn.BatchNorm1d),
    "across documents": lambda: SmallModel(WITHOUT_DOCUMENTS),
    "off by one": lambda: SmallModel(OFF_BY_ONE),
    "convolution that looks ahead": lambda: SmallModel(DOCUMENTS, look_ahead=1),
    "positions by content": lambda: PlacedByContent(DOCUMENTS),
}


@pytest.mark.parametrize("name", ["right", *LEAKING_MODELS])
def test_models_with_our_attention(name: str) -> None:
    model = SmallModel(DOCUMENTS) if name == "right" else LEAKING_MODELS[name]()
    ids = torch.randint(0, 50, (14,), generator=torch.Generator().manual_seed(0))
    report = audit_mask(model.double(), DOCUMENTS, ids, num_layers=1)
    assert report.ok == (name == "right"), str(report)
    assert {finding.kind for finding in report.findings} <= {"leak"}


def test_rows_that_follow_each_other_are_told_together() -> None:
    report = audit_mask(attention(DOCUMENTS, AttnMask.causal(14).to_dense()), DOCUMENTS)
    assert "\n  leak: v[0] changes out[5:14]\n" in str(report)
    assert "are wrong" in str(report)
    printed = str(report).splitlines()
    assert len(printed) == 14
    assert int(printed[-1].split()[1]) < len(report.findings)
    gradients = AuditReport(DOCUMENTS, 1, 1, tuple(Finding("leak", "gradient", ("k", at), 9) for at in (1, 2, 4)))
    assert str(gradients).endswith(
        "3 are wrong\n  leak: k[1:3] gets a gradient from out[9]\n  leak: k[4] gets a gradient from out[9]"
    )


def test_a_model_of_token_ids() -> None:
    mask = DOCUMENTS
    torch.manual_seed(0)
    embedding, model = torch.nn.Embedding(50, 32, dtype=torch.float64), Model(mask, 1)
    ids = torch.randint(0, 50, (14,))
    audit_mask(lambda x: model(embedding(x)), mask, ids, num_layers=1).check()
    assert not audit_mask(lambda x: model(embedding(x).roll(1, 0)), mask, ids, num_layers=1).ok


def test_probes_of_a_long_mask_are_at_its_edges() -> None:
    mask = AttnMask.varlen([0, 150, 151, 400], causal=True)
    leaking = attention(
        mask, mask.to_dense() | AttnMask.from_slices([(151, 152)], [(149, 150)], 0, 400, 400).to_dense()
    )
    report: AuditReport = audit_mask(leaking, mask, max_probes=12)
    assert report.num_probes == 24
    assert Finding("leak", "perturbation", ("v", 149), 151) in report.findings


def test_mistakes_are_told() -> None:
    mask = MASKS["cross"]
    with pytest.raises(ValueError, match="as many queries as keys"):
        audit_mask(lambda x: x, mask, num_layers=1)
    with pytest.raises(ValueError, match="inputs must be q of 9 tokens, k of 8 tokens, v of 8 tokens"):
        audit_mask(attention(mask), mask, torch.zeros(9, 2, 4))
    with pytest.raises(ValueError, match="one row for each of the 9 queries"):
        audit_mask(lambda q, k, v: k, mask)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["audit", "--mask", "varlen-causal", "--tokens", "40", "--mean-length", "10"]
    assert main(asked) == 0
    assert "exactly the permitted ones are there" in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted_leak.py").write_text(
        "import torch\n\n\ndef attend(q, k, v):\n"
        "    return torch.nn.functional.scaled_dot_product_attention(\n"
        "        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)\n"
    )
    assert main([*asked, "--function", "planted_leak:attend"]) == 2
    assert "leak: v[0] changes out[" in capsys.readouterr().err
    causal = ["audit", "--mask", "causal", "--tokens", "20", "--function", "planted_leak:attend"]
    assert main(causal) == 0
    for wrong in ("planted_leak", "planted_leak:nothing", "no_such_module:attend"):
        assert main([*asked, "--function", wrong]) == 2
