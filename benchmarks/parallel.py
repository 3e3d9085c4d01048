"""`python -m benchmarks parallel` (`make bench-parallel`): what the passes for several ranks change, and cost.

Parts: `dense` and `experts` run tensor-parallel decoder layers on two ranks, the variants in turn (collectives and
bytes of a layer, exact from the compiled programs; step time on the host runtime); `nz` compares products with weights
in FRACTAL_NZ and in plain rows; `moe` is `python -m benchmarks moe`, where there is such. Parts go to
benchmarks/results/parallel_<part>.json one by one: what is stopped goes on by --resume. The page
docs/parallel_figures.md is written from them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept, parallel_page
from benchmarks.apart import ROOT
from npu_compiler.backend import fingerprint

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "parallel_figures.md"
PARTS = ("dense", "experts", "nz", "moe")
RANKS, ROUNDS, QUICK_ROUNDS = 2, 5, 2
TIMEOUT_S = 900
Record = dict[str, Any]


def on_ranks(part: str, rounds: int) -> list[Record]:
    """What benchmarks/parallel_ranks.py finds on RANKS processes.

    Raises:
        RuntimeError: a rank failed; the end of its output is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.parallel_ranks", folder]
        outputs = [Path(folder, f"output.{rank}") for rank in range(RANKS)]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(RANKS), part, str(rounds)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            codes = [process.wait(timeout=TIMEOUT_S) for process in running]
        finally:
            for process in running:
                process.kill()
        for rank, code in enumerate(codes):
            if code:
                raise RuntimeError(f"rank {rank}: exit code {code}\n{outputs[rank].read_text()[-3000:]}")
        return list(json.loads(Path(folder, "found.json").read_text()))


def nz(rounds: int) -> list[Record]:
    """What benchmarks/nz_products.py finds in a process of its own.

    Raises:
        RuntimeError: it found nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "found.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.nz_products", str(target), str(rounds)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
        )  # fmt: skip
        if not target.exists():
            raise RuntimeError(f"nz: exit code {done.returncode}\n{done.stdout[-3000:]}")
        return list(json.loads(target.read_text()))


def main(arguments: Sequence[str]) -> int:
    """0 when every part could be measured, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks parallel", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs; writes no page")
    parser.add_argument("--resume", action="store_true", help="leave out parts that are there for this very compiler")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the parts there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no {part!r}; there are {', '.join(PARTS)}")
    options.results.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in chosen if not options.page else ():
        failed |= not _run(part, options)
    if not options.quick:
        found = {part: _kept(options.results, part) for part in PARTS}
        PAGE.write_text(parallel_page.page({part: one for part, one in found.items() if one}))
    return int(failed)


def _run(part: str, options: argparse.Namespace) -> bool:
    """Measures a part and keeps it; whether that worked."""
    if part == "moe":
        return _other_command(options)
    rounds, compiler = QUICK_ROUNDS if options.quick else ROUNDS, fingerprint()
    there = _kept(options.results, part)
    if options.resume and kept.is_current(there, compiler, [rounds]):
        print(f"{part}: there already", flush=True)
        return True
    try:
        make = (lambda: nz(rounds)) if part == "nz" else (lambda: on_ranks(part, rounds))
        found = kept.measured(make, compiler=compiler, depths=[rounds])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"benchmarks parallel: {part}: {error}", file=sys.stderr)
        return False
    _file(options.results, part).write_text(json.dumps(found, indent=1) + "\n")
    print(*parallel_page.table(part, found["records"]), sep="\n")
    loaded = ", others worked beside it" if kept.loaded(found) else ""
    print(f"{part}: {found['about']['seconds']:.0f} s{loaded}", flush=True)
    return True


def _other_command(options: argparse.Namespace) -> bool:
    """Drop rates and gains of experts on several ranks, which have a command and a page of their own."""
    if importlib.util.find_spec("benchmarks.moe") is None:
        print("moe: there is no `python -m benchmarks moe` yet", flush=True)
        return True
    command = [sys.executable, "-m", "benchmarks", "moe", *["--quick"] * options.quick]
    return subprocess.run(command, cwd=ROOT, timeout=4 * TIMEOUT_S).returncode == 0


def _kept(folder: Path, part: str) -> Record | None:
    file = _file(folder, part)
    return dict(json.loads(file.read_text())) if file.exists() else None


def _file(folder: Path, part: str) -> Path:
    return folder / f"parallel_{part}.json"
