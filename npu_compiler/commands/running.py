"""What the commands have in common that run programs of a bundle: replay, bisect, minify."""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from npu_compiler.commands import BUNDLE, add_graph

if TYPE_CHECKING:
    from npu_compiler.inspect.worker import Source, Worker

RUNS_CODE = (
    "This runs what is in the bundle, in a process of its own: operators of torch.ops by their names, and the modules "
    "that the options `rules` and `passes` of the compilation, and the file surroundings.json, name. Use it on bundles "
    "that you trust."
)
RIGHT, WRONG, CAN_NOT, INTERRUPTED = 0, 1, 2, 130
CODES = "Exits 0 where nothing is wrong, 1 where something is, 2 where it can't be told, 130 when interrupted."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to run, and how."""
    parser.add_argument("bundle", help=BUNDLE)
    add_graph(parser)
    parser.add_argument("--made-up", action="store_true", help="leave saved inputs alone, and make some up")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE",
                        help="import this first: what registers your operators")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="compile with this option instead of the bundle's")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS",
                        help="how long a program may run before it counts as hanging (default: 300)")  # fmt: skip


@contextlib.contextmanager
def worker_of(parsed: argparse.Namespace) -> Iterator[tuple[Worker, Source]]:
    """The process that runs things, and what it runs."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.replay import options_given
    from npu_compiler.inspect.worker import Source, Worker

    options = None
    if parsed.option:
        replaced = dict(map(_option, parsed.option))
        options = {**options_given(bundle.open(parsed.bundle).graph(parsed.graph), replaced.keys()), **replaced}
    source = Source(bundle=parsed.bundle, graph=parsed.graph, options=options, made_up=parsed.made_up)
    with Worker(parsed.imports, parsed.timeout) as worker:
        yield worker, source


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, [value] if name in ("rules", "passes", "disabled_rules", "disabled_passes") else value


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
