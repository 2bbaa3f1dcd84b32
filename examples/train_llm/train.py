"""The training loop, the same on one rank and on many: where there is a process group, its ranks share each sequence.

What context parallelism adds to a plain loop stands in `Shard` and `sum_over_ranks`; the model is not touched.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data import IGNORED, Sequence, ends_document, packed_sequences, positions_in_documents
from magi_attention.api import (
    calc_attn,
    dispatch,
    get_position_ids,
    magi_attn_varlen_key,
    make_varlen_key_for_new_mask_after_dispatch,
    plan_of,
    roll,
)
from magi_attention.plan import AttnPlan
from model import LanguageModel
from settings import Settings

# Its usual lock spans processes, and leaves semaphores behind when a rank's process is ended.
tqdm.set_lock(threading.RLock())


class Shard:
    """One sequence as this rank sees it.

    Attributes:
        key: documents, each causal.
        windowed_key: the same documents through a window, over the same dispatch.
        tokens: ``[num_local_rows]`` int64, this rank's.
        positions: ``[num_local_rows]`` int64, of each in its document.
        labels: ``[num_local_rows]`` int64, the token that follows; `IGNORED` at the end of a document and for padding.
    """

    def __init__(self, sequence: Sequence, settings: Settings, device: torch.device) -> None:
        documents, cu_seqlens = (sequence.cu_seqlens, sequence.cu_seqlens), sequence.cu_seqlens
        heads = settings.num_heads_q, settings.num_heads_kv, settings.head_dim
        self.key = magi_attn_varlen_key(*documents, *heads, causal=True)
        self.windowed_key = make_varlen_key_for_new_mask_after_dispatch(
            *documents, self.key, window_size=(settings.window, 0)
        )
        self.tokens = dispatch(sequence.tokens.to(device), self.key)
        positions = get_position_ids(self.key).to(device)
        self.positions = positions_in_documents(positions, cu_seqlens)
        # The token that follows may be another rank's. Padding rows are at the last token's position, which ends its document.
        following = roll(self.tokens, -1, 0, self.key)
        self.labels = following.masked_fill(ends_document(positions, cu_seqlens), IGNORED)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_windowed: bool) -> Tensor:
        """Attention of this rank's rows to all that the mask gives them."""
        return calc_attn(q, k, v, self.windowed_key if is_windowed else self.key)[0]


def own_device(settings: Settings) -> torch.device:
    """Where this rank computes: the CPU, or a GPU, which it shares with others where there are fewer GPUs than ranks."""
    if settings.device == "cpu":
        return torch.device("cpu")
    rank = dist.get_rank() if dist.is_initialized() else 0
    device = torch.device(settings.device, rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def sum_over_ranks(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over the ranks, in one exchange."""
    if dist.is_initialized():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


@dataclass
class Record:
    """What a run has to tell.

    Attributes:
        losses: of each step, the mean over all predicted tokens, in nats.
        first_gradients: of each parameter, before the first update.
        plans: of each step, for the causal layers and for the windowed ones.
        seconds: of all steps.
        planning_seconds: the share of them in which keys were made.
    """

    losses: list[float] = field(default_factory=list)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    plans: list[tuple[AttnPlan, AttnPlan]] = field(default_factory=list)
    seconds: float = 0.0
    planning_seconds: float = 0.0


def learning_rate(step: int, settings: Settings) -> float:
    """Up along a line, down along a cosine to a tenth."""
    if step < settings.num_warmup:
        return settings.learning_rate * (step + 1) / settings.num_warmup
    share_done = (step - settings.num_warmup) / max(settings.num_steps - settings.num_warmup, 1)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * share_done))


def train(settings: Settings, title: str = "", show_progress: bool = True) -> Record:
    """Train on this rank's share of each sequence; alone where there is no process group."""
    record = Record()
    device = own_device(settings)
    torch.manual_seed(settings.seed)  # the same weights on every rank and device
    model = LanguageModel(settings).to(device, getattr(torch, settings.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    start = time.perf_counter()
    with tqdm(total=settings.num_steps, desc=title, disable=not (show_progress and is_first_rank)) as progress:
        for step, sequence in enumerate(islice(packed_sequences(settings), settings.num_steps)):
            before_planning = time.perf_counter()
            shard = Shard(sequence, settings, device)
            record.planning_seconds += time.perf_counter() - before_planning
            record.plans.append((plan_of(shard.key), plan_of(shard.windowed_key)))

            logits = model(shard.tokens, shard.positions, shard.attend)
            # Over the predictions of all ranks, so that shares add up to the mean.
            share = F.cross_entropy(logits, shard.labels, ignore_index=IGNORED, reduction="sum")
            loss = share / sequence.num_predictions
            optimizer.zero_grad()
            loss.backward()
            total = loss.detach()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            sum_over_ranks(total, *gradients.values())
            if step == 0:
                record.first_gradients = {name: gradient.cpu().clone() for name, gradient in gradients.items()}

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            optimizer.step()
            record.losses.append(total.item())
            progress.set_postfix(loss=f"{record.losses[-1]:.4f}", refresh=False)
            progress.update()
    record.seconds = time.perf_counter() - start
    return record
