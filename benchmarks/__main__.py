"""`python -m benchmarks`: runs the rows, prints the table, and writes one JSON file per row to benchmarks/results/."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks import conditions, plot, stored

# What imports torch, and with it torch_npu, is imported where it is used: --help and `check` need no device.
if TYPE_CHECKING:
    from benchmarks.harness import Row

COMMANDS = {
    "check": ("check", "stored rows against their floors"),
    "compiler": ("compiler", "nodes, kernels, seconds and MiB of compilation"),
    "dump": ("dumping", "what a bundle costs"),
    "instructions": ("instructions", "of a replay, counted by valgrind"),
    "kernels": ("kernels", "the captured tasks of one decoder layer"),
    "parallel": ("parallel", "several ranks, token drop, weights in FRACTAL_NZ, streams"),
}
"""By the name of a command: its module in this folder, and what it is about."""
FAMILIES = ("graph_launch", "decode_step", "int8", "prefill", "streams", "vllm", "compile")
"""The modules of rows, row_*.py, in the order of the table."""
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmark_figures.md"
ROW_TIMEOUT_S = 3600


def all_rows() -> dict[str, Row]:
    """Every row by name, in the order of the table."""
    families = [importlib.import_module(f"benchmarks.row_{family}") for family in FAMILIES]
    return {row.name: row for family in families for row in family.rows()}


def measure_here(name: str, quick: bool) -> stored.Row:
    """One row in this process, as the JSON object that is stored."""
    from benchmarks import harness

    row = all_rows()[name]
    found = harness.run(row, harness.Settings.of(row, quick))
    return {"about": stored.about(row.title, quick, row.threads), "records": found}


def measure_apart(name: str, quick: bool, results: Path, threads: int = 1) -> stored.Row:
    """One row in a process of its own, so that no peer's compiler or signal handlers disturb the next row.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks", "--measure", name, "--results", str(results)]
    done = subprocess.run(
        command + ["--quick"] * quick,
        cwd=ROOT,
        # Streams are threads too, and torch.set_num_threads() holds for the calling thread only.
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ROW_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"row {name}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    measured = stored.read(results, name)
    assert measured is not None, f"row {name}: the process wrote nothing"
    return measured


def kept_rows(results: Path, names: Iterable[str]) -> dict[str, stored.Row]:
    """The stored rows by name, as far as there are any."""
    found = {name: stored.read(results, name) for name in names}
    return {name: row for name, row in found.items() if row is not None}


def write_page(results: Path) -> bool:
    """Writes the page of figures, if `results` has every row, none of them of --quick; else says what is not there."""
    from benchmarks import instructions, rows_page

    rows = all_rows()
    wanted = [*rows, *instructions.ROWS]
    kept = kept_rows(results, wanted)
    left = [name for name in wanted if name not in kept or kept[name]["about"]["quick"]]
    if left:
        print(f"benchmarks: {PAGE.name} is not written: {results} has no full {', '.join(left)}", file=sys.stderr)
        return False
    PAGE.write_text(rows_page.page(kept, {name: row.peers for name, row in rows.items()}))
    print(f"benchmarks: {PAGE}", file=sys.stderr)
    return True


def table(title: str, found: Sequence[dict[str, Any]], disturbances: Sequence[str] = ()) -> str:
    """The row as text: a line per peer, its time, and the ratio to the subject (median, range); what disturbed it."""
    from benchmarks.harness import number

    unit, subject = found[0]["unit"], found[0]["subject"]
    lines = [title, f"  {'':14s} {'median':>9s} {'min':>9s} {'max':>9s} {unit:>3s}   time / time of {subject}"]
    for record in found:
        if record["missing"]:
            lines.append(f"  {record['peer']:14s} missing: {record['missing']}")
            continue
        ratio = "-"
        if record["ratio"] is not None:
            ratio = f"{number(record['ratio'])}  ({number(record['ratio_min'])} .. {number(record['ratio_max'])})"
        line = f"  {record['peer']:14s} {number(record['median']):>9s} {number(record['min']):>9s} "
        line += f"{number(record['max']):>9s}       {ratio}"
        if record["goal"]:
            line += f"   goal {record['goal']}: {'met' if record['met'] else 'NOT met'}"
        lines.append(line)
    first = found[0]
    if first["best_ratio"] is not None:
        lines.append(f"  best rival: {first['best_rival']}, {number(first['best_ratio'])}")
    if first["rest"] is not None:
        span = f"{number(first['rest_min'])} .. {number(first['rest_max'])}"
        lines.append(f"  {subject} beside its part: {number(first['rest'])} {unit}  ({span})")
    notes = [f"{max(record['rounds'] for record in found)} rounds, {first['rejected']} disturbed"]
    notes += ["TOO FEW UNDISTURBED ROUNDS, disturbed ones counted"] * bool(first["noisy"])
    if first["conditions"] is not None:
        notes.append(f"others had {first['conditions']['others']:.0%} of the cores")
    if first["roof"] is not None:
        share = f", {first['roof'] / first['median']:.0%} of it reached" if first["median"] else ""
        notes.append(f"roof {number(first['roof'])} {unit}{share}")
    lines.append(f"  [{'; '.join(notes)}]")
    return "\n".join([*lines, *(f"  DISTURBED ALL THE WHILE: {one}; measure again" for one in disturbances)])


def chosen(names: str | None, quick: bool) -> list[str]:
    """The rows asked for, in the order of the table; without names all, but no long one when `quick`.

    Raises:
        SystemExit: an unknown row; one that is spelled nearly so is named.
    """
    known = list(rows := all_rows())
    if names is None:
        return [name for name in known if not (quick and rows[name].long)]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            meant = suggestion(name, known)
            raise SystemExit(f"benchmarks: no row {name!r}{meant} Rows: {', '.join(known)}")
    return [name for name in known if name in wanted]


def suggestion(name: str, known: Iterable[str], rows: Iterable[str] = ()) -> str:
    """How a sentence ends: with the near one of `known`, with its option if it is of `rows`, or with a full stop."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean '{'--rows ' * (near[0] in rows)}{near[0]}'?" if near else "."


def command(name: str, arguments: Sequence[str]) -> int:
    """Runs one of COMMANDS.

    Raises:
        SystemExit: there is none of this name; one that is spelled nearly so is named, or how to measure such a row.
    """
    if name in COMMANDS:
        module = importlib.import_module(f"benchmarks.{COMMANDS[name][0]}")
        return int(module.main(arguments))
    rows = list(all_rows())
    meant = suggestion(name, [*COMMANDS, *rows], rows)
    raise SystemExit(f"benchmarks: no command {name!r}{meant} Commands: {', '.join(COMMANDS)}")


class ListRows(argparse.Action):
    """--list: prints the rows with their titles, and ends the program."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        for name, row in all_rows().items():
            print(f"{name:26s} {row.title}")
        raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every chosen row was measured (missing peers and missed goals are reported, not failures), else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # where torch is imported all the same
    if arguments and not arguments[0].startswith("-"):
        return command(arguments[0], arguments[1:])
    others = "\n".join(f"  {name:14s}{about}" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"Other commands, as the first argument; each has its --help:\n{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", metavar="ROW[,ROW...]", help="rows to measure; default all, which --list names")
    parser.add_argument("--list", action=ListRows, nargs=0, help="print the rows with their titles")
    parser.add_argument(
        "--quick", action="store_true", help="few short rounds: shows that it runs, the figures are rough"
    )
    parser.add_argument(
        "--results", type=Path, default=stored.RESULTS, help="folder of the JSON files (default: %(default)s)"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the rows there are")
    parser.add_argument("--measure", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        stored.write(options.results, options.measure, measure_here(options.measure, options.quick))
        return 0
    failed = False
    names = [] if options.page else chosen(options.rows, options.quick)
    rows = all_rows()
    for index, name in enumerate(names, 1):
        print(f"[{index}/{len(names)}] {name}", file=sys.stderr, flush=True)
        try:
            measured = measure_apart(name, options.quick, options.results, rows[name].threads)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"benchmarks: {error}\n", file=sys.stderr)
            failed = True
            continue
        except KeyboardInterrupt:
            print(f"\nbenchmarks: interrupted in {name}; the rows before it are stored", file=sys.stderr)
            return 130
        disturbances = conditions.disturbances(measured, kept_rows(options.results, rows).values())
        print(table(measured["about"]["title"], measured["records"], disturbances) + "\n", flush=True)
    picture = options.results / "benchmarks.png"
    problem = plot.draw([*kept_rows(options.results, rows).values()], picture)
    print(f"benchmarks: {problem or picture}", file=sys.stderr)
    if options.page or (options.rows is None and not options.quick):
        failed = not write_page(options.results) or failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
