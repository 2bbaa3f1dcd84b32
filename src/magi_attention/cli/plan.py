"""Plan a mask over any number of ranks, without processes or GPUs, and print what it costs.

magi-attention plan --mask varlen-causal --tokens 1M --ranks 64 --chunk-size 512
magi-attention plan --mask causal --tokens 1M --ranks 64 --mesh 8x8 --sweep
magi-attention plan --mask varlen-causal --lengths lengths.txt --ranks 64 --compare --plot pictures --json report.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from magi_attention.cli import masks, values
from magi_attention.cli.choose import (
    COMPARED,
    DISPATCHERS,
    Job,
    Outcome,
    Setting,
    best_of_each,
    choose,
    settings_of_sweep,
    side_by_side,
    try_setting,
)
from magi_attention.plan.cost import Heads, Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    masks.add_arguments(parser)
    machine, heads = Machine(), Heads()
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--ranks", type=values.count, help="how many; left out, those of the mesh")
    ranks.add_argument("--mesh", type=values.mesh, help="nodes x ranks of a node, 8x8")
    ranks.add_argument("--flops", type=values.rate, default=machine.flops, help="attention FLOP/s of a rank (400T)")
    ranks.add_argument("--bandwidth", type=values.rate, default=machine.bandwidth, help="bytes/s into a rank (40G)")
    ranks.add_argument(
        "--bandwidth-between", type=values.rate, help="bytes/s into a rank from other nodes; left out, as --bandwidth"
    )
    ranks.add_argument("--latency", type=values.seconds, default=machine.latency, help="of an exchange (30us)")
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--heads", type=values.heads, default=(heads.num_heads_q, heads.num_heads_kv), help="of q:k (32:8)"
    )
    model.add_argument("--head-dim", type=values.count, default=heads.head_dim, help="of q, k and v (128)")
    model.add_argument("--itemsize", type=values.count, default=heads.itemsize, help="bytes of an element (2)")
    plan = parser.add_argument_group("the plan")
    plan.add_argument("--chunk-size", type=values.count, help="tokens; left out, 8 chunks a rank")
    plan.add_argument("--dispatcher", choices=DISPATCHERS, default="affinity", help="how chunks are dealt (affinity)")
    plan.add_argument("--degree", type=values.degree, default=1, help="remote stages, or auto: by predicted time (1)")
    plan.add_argument(
        "--crossing",
        choices=("once", "each"),
        default="once",
        help="on a mesh, a row that several ranks of a node need crosses to it once, or to each (once); --compare and --sweep try both",
    )
    plan.add_argument(
        "--move-queries",
        action="store_true",
        help="queries may move instead of keys, also where that is not plain from afar",
    )
    plan.add_argument(
        "--compare", action="store_true", help="all dispatchers, side by side; with --sweep, the best of each"
    )
    plan.add_argument("--sweep", action="store_true", help="chunk sizes and degrees, side by side")
    output = parser.add_argument_group("the output")
    output.add_argument("--json", type=Path, metavar="FILE", help="the report, and what was compared, for programs")
    output.add_argument("--plot", type=Path, metavar="DIR", help="pictures: the mask by rank, loads, traffic, timeline")


def run(args: argparse.Namespace) -> None:
    """Print the report of the plan that was asked for, or of the best of those that were compared."""
    job = _job_of(args)
    documents = f"{job.mask.num_q:,} tokens, {len(job.mask.bands):,} rows of the table"
    print(f"{args.mask}: {documents}, {job.mask.area:,} cells ({1 - job.mask.sparsity:.2%} of the square)")
    once = job.ranks_per_node is not None and args.crossing == "once"
    settings = [Setting(args.dispatcher, args.chunk_size, args.degree, once)]
    if args.sweep:
        settings = settings_of_sweep(job, args.dispatcher)
    if args.compare:
        settings = [replace(one, dispatcher=name) for name in COMPARED for one in settings]
    if job.ranks_per_node is not None and (args.sweep or args.compare):
        settings = [replace(one, once=crossing) for one in settings for crossing in (True, False)]
    outcomes = [try_setting(job, setting) for setting in settings]
    chosen = outcomes[0]
    if len(outcomes) > 1:
        chosen, why = choose(outcomes)
        shown = best_of_each(outcomes) if args.sweep and args.compare else outcomes
        print("\n".join(["", *side_by_side(shown), "", *why, ""]))
    print(chosen.report)
    if args.json is not None:
        args.json.write_text(_to_json(chosen, outcomes) + "\n")
    if args.plot is not None:
        from magi_attention.viz.plan_pictures import save_pictures

        for path in save_pictures(chosen.plan, chosen.report, args.plot):
            print(f"plot: {path}")


def _job_of(args: argparse.Namespace) -> Job:
    per_node = None
    num_ranks = args.ranks
    if args.mesh is not None:
        num_nodes, per_node = args.mesh
        if num_ranks not in (None, num_nodes * per_node):
            raise ValueError(
                f"a mesh of {num_nodes}x{per_node} has {num_nodes * per_node} ranks, --ranks says {num_ranks}; leave one out"
            )
        num_ranks = num_nodes * per_node
    if args.bandwidth_between is not None and per_node is None:
        raise ValueError("--bandwidth-between is of a mesh: say --mesh 8x8 too")
    if num_ranks is None:
        raise ValueError("how many ranks? Say --ranks 64, or --mesh 8x8")
    num_q, num_kv = args.heads
    return Job(
        mask=masks.mask_of(args),
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        heads=Heads(num_q, num_kv, args.head_dim, args.itemsize),
        machine=Machine(args.flops, args.bandwidth, args.latency, args.bandwidth_between, per_node),
        moves_queries=args.move_queries,
    )


def _to_json(chosen: Outcome, outcomes: list[Outcome]) -> str:
    """``report``: of the chosen plan, as `PlanReport.to_json`. ``chosen``, ``compared``: settings, and what came of each."""
    compared = [_in_short(one) for one in outcomes]
    return json.dumps(
        {"report": json.loads(chosen.report.to_json()), "chosen": _in_short(chosen), "compared": compared}, indent=1
    )


def _in_short(one: Outcome) -> dict[str, object]:
    result = one.report
    return {
        **asdict(one.setting),
        "chunk_size": one.plan.q_layout.chunk_size,
        "step": result.step,
        "imbalance": result.imbalance,
        "rows_received": sum(result.rows_received),
        "rows_received_by_busiest": max(result.rows_received),
    }
