"""The command line: ``magi-attention plan ...``; ``magi-attention --help`` lists what there is.

A subcommand is a module of this folder with ``add_arguments(parser)`` and ``run(args)``, whose docstring's first line is its help. It is
imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

# Name of the subcommand, its module here, and what it is for.
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("plan", "what a mask costs on any number of ranks: area, rows, bytes, memory, predicted time"),
    "show": ("show", "a mask as a picture, a page or a drawing in the terminal, by slice, type, rank or stage"),
    "audit": ("audit", "whether an attention function of yours attends exactly a mask's cells"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 where it succeeds, 2 where the user asked for what cannot be."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="magi-attention", description="Exact attention over any slice mask.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, purpose) in SUBCOMMANDS.items():
        if name != asked:
            parsers.add_parser(name, help=purpose)
            continue
        module = importlib.import_module(f"magi_attention.cli.{module_name}")
        own = parsers.add_parser(
            name, help=purpose, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads wants no more, as in `... | head`
        sys.stdout = io.StringIO()
    except (ValueError, OSError) as error:  # what the library says to a user's mistake, or a file that is not there
        print(f"magi-attention {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
