"""Draw a mask: in the terminal, as PNG or SVG, or as an HTML page on which to step through its plan.

magi-attention show --mask varlen-block-causal --tokens 1M
magi-attention show --mask varlen-block-causal --tokens 1M --ranks 16 -o mask.png
magi-attention show --mask varlen-causal --tokens 1M --ranks 16 --color-by stage -o mask.svg
magi-attention show --mask varlen-causal --tokens 64K --ranks 8 -o plan.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from magi_attention.cli import masks, values
from magi_attention.config import DispatchConfig, DistAttnConfig, OverlapConfig
from magi_attention.mask import AttnMask
from magi_attention.plan import AttnPlan, build_plan

_PAGES, _OF_PLANS = (".html", ".htm"), ("rank", "stage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    masks.add_arguments(parser)
    group = parser.add_argument_group("the drawing")
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".png, .svg, .pdf or .html; left out, the terminal"
    )
    group.add_argument(
        "--color-by",
        choices=("slice", "type", *_OF_PLANS),
        help="left out, by rank where ranks are given, else by slice",
    )
    group.add_argument("--ranks", type=values.count, help="plan the mask over so many ranks")
    group.add_argument("--chunk-size", type=values.count, help="of the plan, in tokens; left out, 8 chunks a rank")
    group.add_argument("--degree", type=int, default=1, help="remote stages of the plan (1)")


def run(args: argparse.Namespace) -> None:
    """Draw what was asked for."""
    needs_ranks = args.color_by in _OF_PLANS or (args.output is not None and args.output.suffix in _PAGES)
    if needs_ranks and args.ranks is None:
        raise ValueError("--ranks says over how many ranks the mask is planned, and this drawing shows a plan")
    mask = masks.mask_of(args)
    plan = None if args.ranks is None else _plan(mask, args)
    if args.output is None:
        print(_in_terminal(mask, plan, args.color_by))
        print(_how_to_read(mask, plan is not None and args.color_by != "slice"))
    elif args.output.suffix in _PAGES:
        from magi_attention.viz import write_page

        assert plan is not None
        write_page(plan, args.output, title=f"{args.mask}, {mask.num_q:,} tokens on {args.ranks} ranks")
    else:
        _picture(mask, plan, args)
    if args.output is not None:
        print(f"{args.output}: {mask.num_q:,} queries x {mask.num_k:,} keys, {len(mask.bands):,} rows")


def _plan(mask: AttnMask, args: argparse.Namespace) -> AttnPlan:
    config = DistAttnConfig(
        dispatch_config=DispatchConfig(chunk_size=args.chunk_size), overlap_config=OverlapConfig(degree=args.degree)
    )
    return build_plan(mask, args.ranks, config)


def _in_terminal(mask: AttnMask, plan: AttnPlan | None, color_by: str | None) -> str:
    if color_by in ("type", "stage"):
        raise ValueError(f"the terminal shows slices or ranks; for --color-by {color_by}, give a file with -o")
    if plan is None or color_by == "slice":
        return mask.to_string()
    from magi_attention.viz import plan_to_string

    return plan_to_string(plan)


def _how_to_read(mask: AttnMask, by_rank: bool) -> str:
    """What lies where, and what a character stands for."""
    rows, columns = min(mask.num_q, 32), min(mask.num_k, 64)
    one = (
        "one cell"
        if (rows, columns) == (mask.num_q, mask.num_k)
        else f"{mask.num_q / rows:,.5g} x {mask.num_k / columns:,.5g} cells"
    )
    meaning = "the rank that computes most of them" if by_rank else "█ all attended, ▓▒░ fewer, blank none"
    return f"queries downwards, keys to the right; a character is {one}: {meaning}"


def _picture(mask: AttnMask, plan: AttnPlan | None, args: argparse.Namespace) -> None:
    color_by = args.color_by or ("slice" if plan is None else "rank")
    lengths = f"{args.mask}: {mask.num_q:,} queries x {mask.num_k:,} keys"
    try:
        if plan is None or color_by not in _OF_PLANS:
            mask.plot(args.output, color_by=color_by, title=f"{lengths}, {1 - mask.sparsity:.2%} attended")
        else:
            from magi_attention.viz import plot_plan

            balance = f"on {plan.num_ranks:,} ranks, the busiest with {plan.imbalance:.3f} times the mean of cells"
            plot_plan(plan, args.output, color_by=color_by, title=f"{lengths}\n{balance}")
    except ImportError as error:  # matplotlib is an optional extra, and its absence is the user's to mend
        raise ValueError(str(error)) from error
