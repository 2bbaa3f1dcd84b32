"""Masks by name, as the subcommands take them: ``--mask varlen-causal --tokens 1M``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from magi_attention.cli import values
from magi_attention.mask import AttnMask, varlen, varlen_block_causal
from magi_attention.mask.bands import Ints
from magi_attention.mask.inputs import as_lengths, check_length

NAMES = ("full", "causal", "varlen-full", "varlen-causal", "window", "block-causal", "varlen-block-causal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `mask_of` reads."""
    group = parser.add_argument_group("the mask")
    group.add_argument(
        "--mask",
        required=True,
        type=name_or_file,
        metavar="NAME",
        help=f"{', '.join(NAMES)}, or a FILE.json of AttnMask.to_json",
    )
    group.add_argument("--tokens", type=values.count, help="tokens in all: 65536, 64K, 1M; left out, the sum of FILE")
    group.add_argument(
        "--lengths", type=Path, metavar="FILE", help="document lengths, ints apart by spaces, commas or lines"
    )
    group.add_argument(
        "--mean-length", type=values.count, default=15_000, help="without FILE: of the log-normal lengths (15000)"
    )
    group.add_argument("--seed", type=int, default=0, help="without FILE: of the log-normal lengths (0)")
    group.add_argument(
        "--window", type=values.count, default=4096, help="of the window mask: keys before each query (4096)"
    )
    group.add_argument(
        "--block", type=values.count, default=2048, help="tokens of a block of block-causal masks (2048)"
    )


def name_or_file(text: str) -> str:
    """The name of a mask, or of a file that holds one."""
    if text not in NAMES and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(NAMES)}, or a file that ends in .json, got {text!r}"
        )
    return text


def mask_of(args: argparse.Namespace) -> AttnMask:
    """The mask that the options name. ``window`` and the plain ones are one document, unless FILE gives more."""
    if args.mask not in NAMES:
        return AttnMask.from_json(Path(args.mask).read_text(encoding="utf-8"))
    packed = args.mask.startswith("varlen-") or args.lengths is not None
    lengths = document_lengths(args) if packed else np.array([_tokens(args)], np.int64)
    cu_seqlens = np.append(0, np.cumsum(lengths))
    kind = args.mask.removeprefix("varlen-")
    if kind == "block-causal":
        return varlen_block_causal(cu_seqlens, args.block)
    if kind == "window":
        return varlen(cu_seqlens, window_size=(args.window, 0))
    return varlen(cu_seqlens, causal=kind == "causal")


def document_lengths(args: argparse.Namespace) -> Ints:
    """``[num_documents]``: those of FILE, of which ``--tokens`` takes as many as fit; else log-normal ones (sigma 1) that fill it.

    Raises:
        ValueError: a file of something else than positive ints, or of fewer tokens than are asked for.
    """
    if args.lengths is None:
        return log_normal_lengths(_tokens(args), args.mean_length, args.seed)
    words = args.lengths.read_text(encoding="utf-8", errors="replace").replace(",", " ").split()
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(
            f"{args.lengths} must hold positive ints, the lengths of documents, got {' '.join(words[:5])!r}"
        )
    lengths = as_lengths([int(word) for word in words], f"the lengths in {args.lengths}")
    if args.tokens is None:
        return lengths
    ends = np.minimum(np.cumsum(lengths), args.tokens)
    if ends[-1] < args.tokens:
        raise ValueError(
            f"{args.lengths} holds {int(ends[-1]):,} tokens, fewer than the {args.tokens:,} asked for; leave --tokens out to plan them all"
        )
    cut = np.diff(ends, prepend=0)
    return cut[cut > 0]


def log_normal_lengths(total: int, mean: float, seed: int) -> Ints:
    """``[num_documents]``: lengths that fill ``total`` tokens, the last cut to fit."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    room = total
    while room:
        lengths.append(min(int(rng.lognormal(math.log(mean) - 0.5, 1.0)) + 1, room))
        room -= lengths[-1]
    return np.array(lengths, np.int64)


def _tokens(args: argparse.Namespace) -> int:
    if args.tokens is None:
        raise ValueError(f"--tokens says how long the {args.mask} mask is, and it is missing")
    return check_length(args.tokens, "--tokens")
