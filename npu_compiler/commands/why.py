"""`npu-compiler why`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import BUNDLE, add_graph, print_json

HELP = "why a rule did not fire: how far it got, where, and what stopped it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, rule and place."""
    parser.add_argument("bundle", help=BUNDLE)
    parser.add_argument("rule", help="the rule's name, or that of a pass without rules")
    parser.add_argument("node", nargs="?", default="", help="only at this call, or at places that contain this text")
    add_graph(parser)


def run(parsed: argparse.Namespace) -> int:
    """Prints where a rule fired and where it did not, graph by graph."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.why import why

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else found.graphs
    answers = [why(graph, parsed.rule, parsed.node) for graph in graphs]
    if parsed.json:
        print_json(answers)
    else:
        print("\n".join(f"{graph.name}: {answer}" for graph, answer in zip(graphs, answers, strict=True)))
    return 0
