"""The demo's training is the same on one rank, on several, and written out in plain torch; its report tells when it is not."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from torch import Tensor
from torch.nn import functional as F

from data import NUM_BYTES, ends_document, packed_sequences, positions_in_documents
from magi_attention.testing.dist import shared_pool
from model import LanguageModel
from picture import save_picture
from report import disagreements, draw_owners, loss_table
from settings import Settings
from train import Record, train

# A length that no number of ranks divides, so that there is padding.
TINY = Settings(
    num_steps=6,
    num_warmup=1,
    num_tokens=331,
    min_document=1,
    max_document=150,
    window=16,
    num_heads_q=2,
    num_heads_kv=1,
    head_dim=8,
    hidden_dim=24,
    dtype="float64",
)


@pytest.fixture(scope="module")
def one() -> Record:
    return train(TINY, show_progress=False)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_train_as_one(one: Record, num_ranks: int) -> None:
    records = shared_pool().run(train, TINY, "", False, num_ranks=num_ranks)
    for record in records:
        np.testing.assert_allclose(record.losses, one.losses, rtol=1e-9)
        for name, gradient in one.first_gradients.items():
            assert (record.first_gradients[name] - gradient).norm() <= 1e-9 * gradient.norm(), name
        assert [plans[0].num_ranks for plans in record.plans] == [num_ranks] * TINY.num_steps
    # Something moved, or the ranks had nothing to get wrong.
    assert records[0].plans[0][0].received_rows.sum() > 0
    assert disagreements(one, records[0]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_train_as_the_cpu(one: Record) -> None:
    for record in shared_pool().run(train, replace(TINY, device="cuda"), "", False, num_ranks=2):
        np.testing.assert_allclose(record.losses, one.losses, rtol=1e-9)
        assert disagreements(one, record) == []


def test_first_step_is_that_of_plain_torch(one: Record) -> None:
    sequence = next(packed_sequences(TINY))
    document = torch.repeat_interleave(torch.tensor(np.diff(sequence.cu_seqlens)))
    position = torch.cat([torch.arange(length) for length in np.diff(sequence.cu_seqlens)])
    distance = position[:, None] - position
    is_causal = (document[:, None] == document) & (distance >= 0)
    is_near = is_causal & (distance <= TINY.window)

    def attend(q: Tensor, k: Tensor, v: Tensor, is_windowed: bool) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = is_near if is_windowed else is_causal
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)

    torch.manual_seed(TINY.seed)
    model = LanguageModel(TINY).double()
    log_probabilities = model(sequence.tokens, position, attend).log_softmax(-1)
    is_predicting = document[:-1] == document[1:]
    loss = -log_probabilities[:-1][is_predicting, sequence.tokens[1:][is_predicting]].mean()
    loss.backward()
    assert loss.item() == pytest.approx(one.losses[0], rel=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (one.first_gradients[name] - parameter.grad).norm() <= 1e-9 * parameter.grad.norm(), name


def test_the_model_learns(one: Record) -> None:
    assert one.losses[0] == pytest.approx(np.log(NUM_BYTES), rel=0.05)
    assert one.losses[-1] < one.losses[0] - 0.2


def test_sequences_are_packed_documents() -> None:
    for sequence in islice(packed_sequences(TINY), 20):
        lengths = np.diff(sequence.cu_seqlens)
        assert len(sequence.tokens) == sequence.cu_seqlens[-1] == TINY.num_tokens
        assert (lengths > 0).all()
        assert (lengths <= TINY.max_document).all()
        assert sequence.num_predictions == (lengths - 1).sum()
        positions = torch.arange(TINY.num_tokens)
        in_document = positions_in_documents(positions, sequence.cu_seqlens)
        assert in_document.tolist() == [i for length in lengths for i in range(length)]
        assert ends_document(positions, sequence.cu_seqlens).nonzero()[:, 0].tolist() == [
            end - 1 for end in sequence.cu_seqlens[1:]
        ]


def test_report_tells_a_difference(one: Record) -> None:
    assert disagreements(one, one) == []
    worse_first = replace(one, losses=[one.losses[0] * (1 + 2e-5), *one.losses[1:]])
    worse_later = replace(one, losses=[*one.losses[:-1], one.losses[-1] * (1 + 2e-3)])
    name = "layers.0.attention.to_q.weight"
    worse_gradient = replace(one, first_gradients=one.first_gradients | {name: one.first_gradients[name] * (1 + 2e-5)})
    for worse, complaint in ((worse_first, "first loss"), (worse_later, "a later loss"), (worse_gradient, name)):
        (line,) = disagreements(one, worse)
        assert complaint in line


def test_report_has_every_step(one: Record) -> None:
    table = loss_table(one, one, num_ranks=2)
    assert all(f"{loss:.7f}" in table for loss in one.losses)


def test_drawings_show_each_field_s_owner(tmp_path: Path) -> None:
    records = shared_pool().run(train, replace(TINY, num_steps=1), "", False, num_ranks=2)
    plan = records[0].plans[0][0]
    lines = draw_owners(plan, num_rows=TINY.num_tokens, num_columns=TINY.num_tokens)
    dense = plan.mask.to_dense()
    for query, line in enumerate(lines[1:-1]):
        owner = str(plan.q_layout.owner[query // plan.q_layout.chunk_size])
        assert line[1:-1] == "".join(owner if attended else " " for attended in dense[query])

    save_picture(tmp_path / "folder" / "picture.png", records[0], records[0])
    pixels = image.imread(tmp_path / "folder" / "picture.png")
    # Both ranks' colours: the first two of matplotlib's.
    for colour in ((31, 119, 180), (255, 127, 14)):
        is_colour = np.abs(pixels[..., :3] * 255 - colour).max(axis=-1) < 1
        assert is_colour.sum() > 1000
