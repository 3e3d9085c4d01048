"""`npu-compiler show`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from npu_compiler.commands import BUNDLE, add_graph, print_json

if TYPE_CHECKING:
    from npu_compiler.inspect.bundle import StoredGraph
    from npu_compiler.inspect.program import Data

HELP = "what was done to the graphs of a bundle, as text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, graph and stage."""
    parser.add_argument("bundle", help=BUNDLE)
    parser.add_argument("--stage", default="", help="print the program at this stage as Python: lowered, final, a pass")
    add_graph(parser)


def run(parsed: argparse.Namespace) -> int:
    """Prints the pipelines of a bundle's graphs, or the programs at one stage."""
    from npu_compiler.inspect import bundle, show

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else found.graphs
    if parsed.json and parsed.stage:
        print_json([graph.program(graph.stage(parsed.stage)) for graph in graphs])
    elif parsed.json:
        print_json([found.header, *found.captures, *(part for graph in graphs for part in _parts(graph))])
    elif parsed.stage:
        print("\n\n".join(graph.python(graph.stage(parsed.stage)) for graph in graphs))
    else:
        print(show.overview(found, graphs))
    return 0


def _parts(graph: StoredGraph) -> list[Data]:
    from npu_compiler.inspect.contents import Stage

    missing = [Stage(name="incomplete", error=graph.incomplete)] if graph.incomplete else []
    return [graph.about, *graph.stages, *missing, *([graph.plan] if graph.plan is not None else []), *graph.captures]
