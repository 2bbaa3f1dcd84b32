"""Audit a function of yours: perturb tokens and follow gradients, and compare what depends on what with a mask.

magi-attention audit --mask varlen-causal --tokens 96 --mean-length 24
magi-attention audit --mask varlen-causal --tokens 96 --mean-length 24 --function my_model.attention:attend
magi-attention audit --mask window --window 8 --tokens 64 --function my_model.model:forward --layers 2 --dim 64

The function takes (q, k, v), tokens first, and returns a row for each query; with --layers it takes x [tokens, dim] and returns a row
for each token. Left out, it is this package's own attention.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from magi_attention.cli import masks, values
from magi_attention.mask import AttnMask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    masks.add_arguments(parser)
    group = parser.add_argument_group("the function")
    group.add_argument(
        "--function", metavar="MODULE:NAME", help="left out, flex_flash_attn_func with the mask's slices"
    )
    group.add_argument("--layers", type=values.count, help="it is a model of so many layers with residual connections")
    group.add_argument("--heads", type=values.heads, default=(2, 2), help="of q:k (2:2)")
    group.add_argument("--head-dim", type=values.count, default=16, help="of q, k and v (16)")
    group.add_argument("--dim", type=values.count, default=32, help="with --layers: of x (32)")
    group.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of the inputs (float64)")
    group.add_argument("--device", default="cpu", help="of the inputs (cpu)")
    group.add_argument("--probes", type=values.count, default=128, help="tokens probed on each side at most (128)")


def run(args: argparse.Namespace) -> None:
    """Print what the audit found.

    Raises:
        ValueError: something is wrong with the function, so that the command fails.
    """
    import torch

    from magi_attention.testing.audit import audit_mask

    mask = masks.mask_of(args)
    if args.function is None and args.layers is not None:
        raise ValueError("--layers says that the function is a model, and --function, which names it, is missing")
    function = _own(mask, args.device) if args.function is None else _function(args.function)
    generator = torch.Generator().manual_seed(args.seed)
    heads_q, heads_kv = args.heads
    sizes: list[tuple[int, ...]] = [(mask.num_q, args.dim)]
    if args.layers is None:
        sizes = [(mask.num_q, heads_q, args.head_dim), *[(mask.num_k, heads_kv, args.head_dim)] * 2]
    inputs = [
        torch.randn(size, generator=generator, dtype=torch.float64).to(args.device, getattr(torch, args.dtype))
        for size in sizes
    ]
    report = audit_mask(function, mask, inputs, num_layers=args.layers, max_probes=args.probes, seed=args.seed)
    if not report.ok:
        raise ValueError(str(report))
    print(report)


def _own(mask: AttnMask, device: str) -> Callable[..., Any]:
    import torch

    from magi_attention.api import flex_flash_attn_func

    slices = [torch.as_tensor(part, dtype=torch.int32, device=device) for part in mask.to_slices()]
    return lambda q, k, v: flex_flash_attn_func(q, k, v, *slices)


def _function(named: str) -> Callable[..., Any]:
    module_name, _, name = named.partition(":")
    if not name:
        raise ValueError(f"--function must be MODULE:NAME, such as my_model.attention:attend, got {named!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--function {named} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"--function {named} must be a function, got {type(function).__name__}")
    result: Callable[..., Any] = function
    return result
