"""Train a small language model on one rank, and again with every sequence spread over several; show that nothing changes.

    python examples/train_llm/demo.py

`data.py` packs text, `model.py` is the model, `train.py` the loop, `report.py` and `picture.py` show what came out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from data import source_files
from magi_attention.testing.dist import run_ranks
from model import LanguageModel
from picture import save_picture
from report import (
    WHY_LOSSES_DRIFT,
    balance_table,
    disagreements,
    draw_side_by_side,
    gradient_difference,
    loss_table,
    relative_differences,
)
from settings import Settings
from train import train


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description="Train a small language model on one rank and on several, and compare."
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes that share each sequence (default %(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="default %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=defaults.num_tokens, help="bytes of a sequence (default %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default=defaults.dtype, help="default %(default)s")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=defaults.device,
        help="of the ranks; one rank alone computes on the CPU",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/train_llm.png"), help="the picture (default %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none: leave it out")
    return arguments


def introduce(settings: Settings, num_ranks: int) -> None:
    """Say what is about to happen."""
    num_parameters = sum(p.numel() for p in LanguageModel(settings).parameters())
    print(
        f"A Llama-style model of {num_parameters:,} parameters reads {len(source_files()):,} source files of this Python's standard "
        f"library,\n{settings.num_tokens:,} bytes a step, packed as documents: half of its {settings.num_layers} layers are causal within "
        f"each document, half see a window of {settings.window} besides.\nFirst on one rank, then the same steps on {num_ranks} ranks that "
        f"share every sequence{' and compute on GPUs' if settings.device == 'cuda' else ''}.\n",
        flush=True,
    )


def main() -> int:
    """Train twice, compare, show; the exit status says whether the runs agree."""
    start = time.perf_counter()
    arguments = parse_arguments()
    num_ranks = arguments.ranks
    settings = Settings(
        num_steps=arguments.steps, num_tokens=arguments.tokens, dtype=arguments.dtype, device=arguments.device
    )
    num_cores = os.cpu_count() or 1
    introduce(settings, num_ranks)

    torch.set_num_threads(num_cores)
    one = train(replace(settings, device="cpu"), "1 rank ")
    threads = max(num_cores // num_ranks, 1)
    many = run_ranks(train, num_ranks, settings, f"{num_ranks} ranks", threads=threads, timeout=3600)[0]

    print(f"\nThe last step's masks: each attended field is the number of the rank of {num_ranks} that computes it.\n")
    print(draw_side_by_side(many.plans[-1], colour=sys.stdout.isatty()))
    save_picture(arguments.output, one, many)
    print(f"\nDrawn finer, with loads and losses, in {arguments.output}")

    print(f"\nLoss per step, in nats a byte ({settings.dtype}):\n\n{loss_table(one, many, num_ranks)}\n")
    print(f"Work and traffic, over all steps on {num_ranks} ranks:\n\n{balance_table(many, num_ranks)}\n")
    shared = f"the same {num_cores} cores" if settings.device == "cpu" else f"{torch.cuda.device_count()} GPU(s)"
    print(
        f"Seconds: {one.seconds:.1f} on 1 rank, {many.seconds:.1f} on {num_ranks} ({many.planning_seconds:.1f} of them planning); ranks "
        f"share {shared} here, so this shows\nthat the work is the same, not that it gets faster. "
        f"{time.perf_counter() - start:.1f} in all.\n"
    )
    gradient, name = gradient_difference(one, many)
    print(
        f"Relative differences: first loss {relative_differences(one, many)[0]:.1e}, first gradients at most {gradient:.1e} ({name}), "
        f"losses at most {max(relative_differences(one, many)):.1e}.\n\n{WHY_LOSSES_DRIFT}\n"
    )
    wrong = disagreements(one, many)
    print("\n".join(f"DISAGREES: {line}" for line in wrong) or f"One rank and {num_ranks} ranks agree.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
