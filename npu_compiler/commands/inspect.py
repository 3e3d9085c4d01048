"""`npu-compiler inspect`."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from pathlib import Path

from npu_compiler.commands import BUNDLE, add_graph

HELP = "one HTML file to look through a bundle in a browser: no server, no network"
DESCRIPTION = (
    "Writes a page with the programs of every stage, what each pass changed, the graph, source lines, streams, memory, "
    "captures and facts. Nothing that is in the bundle can run there."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bundle, and where the page goes."""
    parser.add_argument("bundle", help=BUNDLE)
    add_graph(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the bundle's name with .html, here")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def run(parsed: argparse.Namespace) -> int:
    """Writes the page, and prints its path and size; with --json, prints the page's data and writes nothing."""
    from npu_compiler.inspect import bundle, page

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else None
    if parsed.json:
        print(json.dumps(page.data_of(found, graphs)))
        return 0
    file: Path = parsed.output or Path(f"{Path(parsed.bundle).resolve().stem}.html")
    try:
        file.write_text(page.render(found, graphs), encoding="utf-8")
    except OSError as error:
        print(f"{file} can't be written: {error.strerror}; name another place with -o", file=sys.stderr)
        return 2
    print(f"{file.resolve()}, {file.stat().st_size / 1024:.0f} KiB")
    for graph in found.graphs if graphs is None else graphs:
        if graph.incomplete:
            print(f"{graph.name} is incomplete: {graph.incomplete}")
    if parsed.open:
        webbrowser.open(file.resolve().as_uri())
    return 0
