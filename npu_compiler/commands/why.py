"""`npu-compiler why`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import BUNDLE, add_graph, print_json

HELP = "why a rule did not fire: how far it got, where, and what stopped it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, rule and place."""
    parser.add_argument("bundle", help=BUNDLE)
    parser.add_argument("rule", help="the name of a rule, or of a pass")
    parser.add_argument("node", nargs="?", default="", help="only at this call, or at places that contain this text")
    parser.add_argument("--all", action="store_true", help="print all misses, not only the nearest; --json has all")
    add_graph(parser)


def run(parsed: argparse.Namespace) -> int:
    """Prints where a rule fired and where it did not, graph by graph."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.why import NEAREST, answers

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else found.graphs
    given = answers(graphs, parsed.rule, parsed.node)
    if parsed.json:
        print_json([answer for _, answer in given])
    else:
        most = None if parsed.all else NEAREST
        print("\n".join(f"{graph.name}: {answer.text(most)}" for graph, answer in given))
    return 0
