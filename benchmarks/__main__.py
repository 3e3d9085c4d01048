"""`python -m benchmarks`: runs the rows, prints the table, and writes one JSON file per row to benchmarks/results/."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    apart,
    check,
    compiler,
    dumping,
    harness,
    instructions,
    kernels,
    parallel,
    plot,
    row_compile,
    row_decode_step,
    row_graph_launch,
    row_int8,
    row_prefill,
    row_streams,
    row_vllm,
    rows_page,
)
from benchmarks.harness import Row, Settings, number, run

RESULTS = Path(__file__).parent / "results"
PAGE = apart.ROOT / "docs" / "benchmark_figures.md"
ROW_TIMEOUT_S = 3600


def all_rows() -> dict[str, Row]:
    """Every row by name, in the order of the table."""
    families = (row_graph_launch, row_decode_step, row_int8, row_prefill, row_streams, row_vllm, row_compile)
    return {row.name: row for family in families for row in family.rows()}


def measure_here(name: str, quick: bool) -> dict[str, Any]:
    """One row in this process, as the JSON object that is stored."""

    row = all_rows()[name]
    found = run(row, Settings.of(row, quick))
    loaded = ("torch", "torch_npu", "onnxruntime", "openvino")
    versions = {module: sys.modules[module].__version__ for module in loaded if module in sys.modules}
    about = {"title": row.title, "quick": quick, "machine": harness.machine(), "versions": versions}
    return {"about": {**about, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, "records": found}


def measure_apart(name: str, quick: bool, results: Path) -> dict[str, Any]:
    """One row in a process of its own, so that no peer's compiler or signal handlers disturb the next row.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    target = results / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks", "--measure", name, "--results", str(results)]
    done = subprocess.run(
        command + ["--quick"] * quick,
        cwd=Path(__file__).parent.parent,
        # Streams are threads too, and torch.set_num_threads() holds for the calling thread only.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ROW_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"row {name}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return dict(json.loads(target.read_text()))


def kept_rows(results: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The stored rows by name, as far as there are any; without `names` those of the table, in its order."""
    files = {name: results / f"{name}.json" for name in (all_rows() if names is None else names)}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def write_page(results: Path) -> bool:
    """Writes the page of figures, if `results` has every row, none of them of --quick; else says what is not there."""
    wanted = [*all_rows(), *instructions.ROWS]
    stored = kept_rows(results, wanted)
    left = [name for name in wanted if name not in stored or stored[name]["about"]["quick"]]
    if left:
        print(f"benchmarks: {PAGE.name} is not written: {results} has no full {', '.join(left)}", file=sys.stderr)
        return False
    PAGE.write_text(rows_page.page(stored))
    print(f"benchmarks: {PAGE}", file=sys.stderr)
    return True


def table(title: str, found: Sequence[dict[str, Any]]) -> str:
    """The row as text: a line per peer, its time, and the ratio to the subject (median, range)."""
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
    if first["floor"] is not None:
        share = f", {first['floor'] / first['median']:.0%} of it reached" if first["median"] else ""
        notes.append(f"floor {number(first['floor'])} {unit}{share}")
    return "\n".join([*lines, f"  [{'; '.join(notes)}]"])


def chosen(names: str | None, quick: bool) -> list[str]:
    """The rows asked for, in the order of the table; without names all, but no long one when `quick`.

    Raises:
        SystemExit: an unknown row; the nearest one is named.
    """
    known = list(rows := all_rows())
    if names is None:
        return [name for name in known if not (quick and rows[name].long)]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SystemExit(f"benchmarks: no row {name!r}, did you mean {nearest!r}? Rows: {', '.join(known)}")
    return [name for name in known if name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every chosen row was measured (missing peers and missed goals are reported, not failures), else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["kernels"]:
        return kernels.main(arguments[1:])
    if arguments[:1] == ["compiler"]:
        return compiler.main(arguments[1:])
    if arguments[:1] == ["parallel"]:
        return parallel.main(arguments[1:])
    if arguments[:1] == ["dump"]:
        return dumping.main(arguments[1:])
    if arguments[:1] == ["instructions"]:
        return instructions.main(arguments[1:])
    if arguments[:1] == ["check"]:
        return check.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="Other commands, as the first argument: `kernels` (the captured tasks of one decoder layer), `compiler` "
        "(nodes, kernels, seconds and MiB of compilation), `check` (stored rows against their floors), `dump` (what a "
        "bundle costs), `instructions` (of a replay, counted by valgrind), `parallel` (several ranks, token drop, "
        "weights in FRACTAL_NZ, streams); each has its --help.",
    )
    parser.add_argument("--rows", metavar="ROW[,ROW...]", help=f"rows; default all: {', '.join(all_rows())}")
    parser.add_argument(
        "--quick", action="store_true", help="few short rounds: shows that it runs, the figures are rough"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the rows there are")
    parser.add_argument("--measure", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    if options.measure:
        measured = measure_here(options.measure, options.quick)
        unfinished = options.results / f"{options.measure}.json.part"  # an older row stays until there is a new one
        unfinished.write_text(json.dumps(measured, indent=1) + "\n")
        unfinished.replace(options.results / f"{options.measure}.json")
        return 0
    failed = False
    names = [] if options.page else chosen(options.rows, options.quick)
    for index, name in enumerate(names, 1):
        print(f"[{index}/{len(names)}] {name}", file=sys.stderr, flush=True)
        try:
            measured = measure_apart(name, options.quick, options.results)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"benchmarks: {error}\n", file=sys.stderr)
            failed = True
            continue
        except KeyboardInterrupt:
            print(f"\nbenchmarks: interrupted in {name}; the rows before it are stored", file=sys.stderr)
            return 130
        print(table(measured["about"]["title"], measured["records"]) + "\n", flush=True)
    stored = kept_rows(options.results)
    picture = options.results / "benchmarks.png"
    problem = plot.draw([*stored.values()], picture)
    print(f"benchmarks: {problem or picture}", file=sys.stderr)
    if options.page or (options.rows is None and not options.quick):
        failed = not write_page(options.results) or failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
