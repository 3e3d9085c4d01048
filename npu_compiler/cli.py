"""The `npu-compiler` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_compiler import __version__
from npu_compiler.errors import BundleError

if TYPE_CHECKING:
    from npu_compiler.inspect.bundle import StoredGraph
    from npu_compiler.inspect.program import Data


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    parser = argparse.ArgumentParser(prog="npu-compiler", description="Tools of the ascend backend of torch.compile.")
    parser.add_argument("--version", action="version", version=f"npu-compiler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which CANN is used and why, and what will not work",
        description="Prints what is installed, which CANN is used and why, and what will not work. "
        "Exits 1 when something needed is missing.",
    )
    doctor.add_argument("--json", action="store_true", help="print the same facts as JSON")
    explain = commands.add_parser(
        "explain-miss",
        help="why functions were compiled instead of taken from the cache",
        description="For each compiled program in the cache: the place in the code, and what differed from the nearest "
        "program that was stored before it. $NPU_COMPILER_CACHE names the cache's folder.",
    )
    explain.add_argument("--json", action="store_true", help="print the same facts, and all parts of the keys, as JSON")
    _add_readers(commands)
    parsed = parser.parse_args(arguments)
    if parsed.command == "explain-miss":
        return run_explain_miss(as_json=parsed.json)
    if parsed.command == "doctor":
        return run_doctor(as_json=parsed.json)
    try:
        return {"show": run_show, "why": run_why, "diff": run_diff}[parsed.command](parsed)
    except BundleError as error:
        print(error, file=sys.stderr)
        return 2


def _add_readers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that read bundles. They run nothing that is in one."""
    show = commands.add_parser("show", help="what was done to the graphs of a bundle, as text")
    show.add_argument("bundle", help="a folder that option `dump` wrote, or a zip of it")
    show.add_argument("--stage", default="", help="print the program at this stage as Python: lowered, final, a pass")
    why = commands.add_parser("why", help="why a rule did not fire: how far it got, where, and what stopped it")
    why.add_argument("bundle", help="as for show")
    why.add_argument("rule", help="the rule's name")
    why.add_argument("node", nargs="?", default="", help="only at this call, or at places that contain this text")
    for command in (show, why):
        command.add_argument("--graph", default="", help="only this graph of the bundle")
    diff = commands.add_parser(
        "diff", help="what differs between two bundles, the first difference first; exits 1 then"
    )
    diff.add_argument("left", help="as for show")
    diff.add_argument("right")
    for command in (show, why, diff):
        command.add_argument("--json", action="store_true", help="print the same data as JSON")


def run_doctor(as_json: bool) -> int:
    """Prints the doctor's findings; returns 1 when one of them is an error."""
    from npu_compiler import doctor

    findings = doctor.examine()
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=1))
    else:
        print(doctor.as_text(findings))
    return 1 if any(finding.state == "error" for finding in findings) else 0


def run_explain_miss(as_json: bool) -> int:
    """Prints what is stored and why each of it had been missed."""
    from npu_compiler import cache

    entries = cache.ProgramCache(cache.folder()).entries()
    if as_json:
        print(json.dumps(entries, indent=1))
        return 0
    for entry in entries:
        print("\n".join([entry["name"], *(f"  {line}" for line in entry["missed"])]))
    if not entries:
        print(f"nothing is stored in {cache.folder()}")
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Prints the pipelines of a bundle's graphs, or the programs at one stage."""
    from npu_compiler.inspect import bundle, show

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else found.graphs
    if parsed.json and parsed.stage:
        _print_json([graph.program(graph.stage(parsed.stage)) for graph in graphs])
    elif parsed.json:
        _print_json([found.header, *(part for graph in graphs for part in _parts(graph))])
    elif parsed.stage:
        print("\n\n".join(graph.python(graph.stage(parsed.stage)) for graph in graphs))
    else:
        print(show.overview(found, graphs))
    return 0


def _parts(graph: StoredGraph) -> list[Data]:
    return [graph.about, *graph.stages, *([graph.plan] if graph.plan is not None else []), *graph.captures]


def run_why(parsed: argparse.Namespace) -> int:
    """Prints where a rule fired and where it did not, graph by graph."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.why import why

    found = bundle.open(parsed.bundle)
    graphs = [found.graph(parsed.graph)] if parsed.graph else found.graphs
    answers = [why(graph, parsed.rule, parsed.node) for graph in graphs]
    if parsed.json:
        _print_json(answers)
    else:
        print("\n".join(f"{graph.name}: {answer}" for graph, answer in zip(graphs, answers, strict=True)))
    return 0


def run_diff(parsed: argparse.Namespace) -> int:
    """Prints what differs between two bundles; returns 1 when something does."""
    from npu_compiler.inspect import bundle
    from npu_compiler.inspect.diff import differences

    found = differences(bundle.open(parsed.left), bundle.open(parsed.right))
    if parsed.json:
        _print_json(found)
    else:
        print("\n".join(map(str, found)) or "nothing differs but times")
    return 1 if found else 0


def _print_json(entries: Sequence[Data]) -> None:
    print(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=1))


if __name__ == "__main__":
    sys.exit(main())
