"""`python -m benchmarks instructions`: how many instructions a replay takes for each node, counted by valgrind.

A count does not depend on what else the machine does, so it is the same in every run on one machine with one compiler:
what the time of a replay is too noisy to show, it shows. Counted is all between entering and leaving
host_runtime::Graph::run, kernels included; the wait of a stream that spins is not. valgrind 3.19 knows no AVX-512: the
kernels find that by the processor's features, as on any machine, and run their AVX2 copies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import native, stored
from benchmarks.harness import Missing

NODES, REPLAYS = 1000, 3
COUNTED = "host_runtime::Graph::run()"
TIMEOUT_S = 900
ROWS = {
    "instructions_per_node": ("empty", NODES, f"instructions per node of a graph of {NODES} tasks that do nothing"),
    "instructions_per_addition": ("add", NODES, f"instructions per node of a graph of {NODES} additions of 16 floats"),
    "instructions_per_replay": ("empty", 1, "instructions of a replay of one task that does nothing"),
}
"""By the name of the row: kind and number of nodes of the graph (benchmarks/replay_instructions.cpp), and a title."""


def valgrind() -> str:
    """The command.

    Raises:
        Missing: it is not installed.
    """
    found = shutil.which("valgrind")
    if found is None:
        raise Missing("valgrind is not installed; install it (Debian: apt install valgrind) and run this again")
    return found


def counts(graphs: Sequence[tuple[str, int]], replays: int = REPLAYS) -> list[list[int]]:
    """Instructions of each replay of each graph, given as (kind, nodes); one list of `replays` counts a graph.

    Raises:
        Missing: there is no valgrind or no compiler.
        RuntimeError: the program fails under valgrind; its message is in the error.
    """
    tool = valgrind()
    with tempfile.TemporaryDirectory() as folder:
        libraries = [str(native.LIBRARIES / f"lib{name}.so") for name in ("ascendcl", "opapi")]
        target = Path(folder) / "replay_instructions"
        program = native.compiled(target.name + ".cpp", target, *libraries, f"-Wl,-rpath,{native.LIBRARIES}")
        command = [tool, "--tool=callgrind", f"--callgrind-out-file={folder}/counts", "--collect-atstart=no"]
        command += [f"--toggle-collect={COUNTED}", f"--dump-after={COUNTED}", str(program), str(replays)]
        command += [str(part) for graph in graphs for part in graph]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"the counted program failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        found = [total((Path(folder) / f"counts.{i + 1}").read_text()) for i in range(len(graphs) * replays)]
    return [found[i * replays : (i + 1) * replays] for i in range(len(graphs))]


def total(dump: str) -> int:
    """The sum of one dump of callgrind.

    Raises:
        ValueError: it has none.
    """
    found = re.search(r"^summary: (\d+)$", dump, re.MULTILINE)
    if found is None:
        raise ValueError("callgrind wrote a dump without a summary")
    return int(found[1])


def record(row: str, found: Sequence[int], missing: str | None) -> dict[str, Any]:
    """A row as stored: one record, in the form of the timed rows. The first replay is left out of the figures: it
    also links what is called."""
    nodes = ROWS[row][1]
    per_node = [count / nodes for count in found[1:]]
    figures = {"median": per_node[-1], "min": min(per_node), "max": max(per_node)} if per_node else {}
    empty = dict.fromkeys(("median", "min", "max", "ratio_min", "ratio_max", "best_rival", "best_ratio", "roof"))
    empty |= dict.fromkeys(("goal", "met", "max_abs_error", "rest", "rest_min", "rest_max", "conditions"))
    own = {"row": row, "subject": "replay", "peer": "replay", "unit": "instructions", "ratio": None, **empty, **figures}
    about = stored.about(ROWS[row][2], quick=False)
    return {"about": about, "records": [{**own, "missing": missing, "noisy": False, "rounds": 1, "rejected": 0}]}


def main(arguments: Sequence[str]) -> int:
    """0 when the instructions could be counted and each replay of a graph took equally many, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=stored.RESULTS, help="folder of the JSON files (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    missing = None
    found: list[list[int]] = [[] for _ in ROWS]
    try:
        found = counts([(kind, nodes) for kind, nodes, _ in ROWS.values()])
    except Missing as reason:
        missing = str(reason)
        print(f"benchmarks: {missing}")
    same = True
    for row, of_row in zip(ROWS, found, strict=True):
        made = record(row, of_row, missing)
        stored.write(options.results, row, made)
        if of_row:
            print(f"{ROWS[row][2]}: {made['records'][0]['median']:.2f}")
        if len(set(of_row[1:])) > 1:
            same = False
            print(f"  NOT repeatable: the replays took {', '.join(map(str, of_row))} instructions")
    return 0 if missing is None and same else 1
