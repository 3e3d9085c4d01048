"""`npu-compiler trace`."""

from __future__ import annotations

import argparse

from npu_compiler.commands import BUNDLE, add_graph, print_json

HELP = "how busy each stream of a recorded run was, what its gaps waited for, what took the time"
DESCRIPTION = (
    "Reads a trace that npu_compiler.trace(FILE), vLLM's /start_profile or torch_npu's profiler (trace_view.json) "
    "wrote; times are microseconds. ui.perfetto.dev shows the same file. With --bundle the tasks of a profiler's trace "
    "are told by the order of their launches which call of the compiled program they belong to."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trace, and how much of it."""
    parser.add_argument("file", help="a trace in Chrome's format, or that compressed by gzip")
    parser.add_argument("--top", type=int, default=10, help="entries of each list, the largest first (default 10)")
    parser.add_argument("--bundle", default="", help=f"for a profiler's trace: {BUNDLE}, of the same program")
    add_graph(parser)


def run(parsed: argparse.Namespace) -> int:
    """Prints a timeline in figures."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.timeline import timeline

    graph = bundle.open(parsed.bundle).graph(parsed.graph) if parsed.bundle else None
    found = timeline(parsed.file, parsed.top, graph)
    if parsed.json:
        print_json([found])
    else:
        print(found)
    return 0
