"""`python -m benchmarks parallel` (`make bench-parallel`): what the passes for several ranks change, and cost.

Parts: `dense` and `experts`, decoder layers on two ranks with and without each pass (collectives and bytes of a layer,
exact from the compiled programs, and the time of a step); `drop`, a layer of experts, exact and with tokens dropped,
for even and skewed routing; `nz`, products with weights in FRACTAL_NZ and in plain rows; `streams`, one and two streams
with their timelines. Each goes to benchmarks/results/parallel_<part>.json as soon as it is there; a part that fails is
reported, and the others go on. The page docs/parallel_figures.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import apart, kept, parallel_page, parallel_ranks

RESULTS = Path(__file__).parent / "results"
PAGE = apart.ROOT / "docs" / "parallel_figures.md"
PARTS = tuple(parallel_page.ABOUT)
ON_ONE_RANK = ("nz", "streams")


def measured(part: str, quick: bool) -> list[kept.Record]:
    """The records of a part.

    Raises:
        RuntimeError: a process failed; the end of its output is in the message.
        subprocess.TimeoutExpired: one did not end.
    """
    if part not in ON_ONE_RANK:
        return parallel_ranks.measured(part, quick)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "found.json")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.parallel_rows", str(target), part, "quick" if quick else "whole"],
            cwd=apart.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=apart.TIMEOUT_S,
        )  # fmt: skip
        if not target.exists():
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-3000:]}")
        return list(json.loads(target.read_text()))


def main(arguments: Sequence[str]) -> int:
    """0 when every part could be measured, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks parallel", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few short rounds: shows that it runs; writes no page")
    parser.add_argument("--resume", action="store_true", help="leave out parts that are there for this very compiler")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the parts there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    for part in chosen:
        if part not in PARTS:
            parser.error(f"no {part!r}; there are {', '.join(PARTS)}")
    failed = [] if options.page else [part for part in chosen if not _run(part, options)]
    if options.page or not options.quick:
        found = {part: _kept(options.results, part) for part in PARTS}
        PAGE.write_text(parallel_page.page({part: one for part, one in found.items() if one}))
        print(f"written: {PAGE}")
    if failed:
        print(f"benchmarks parallel: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _run(part: str, options: argparse.Namespace) -> bool:
    """Measures a part, prints and keeps it; whether that worked."""
    from npu_compiler.backend import fingerprint  # brings up torch_npu, which --help needs not

    compiler = fingerprint()
    there = _kept(options.results, part)
    if options.resume and there and (there["about"]["compiler"], there["about"]["quick"]) == (compiler, options.quick):
        print(f"{part}: there already", flush=True)
        return True
    print(f"{part} …", flush=True)
    try:
        found = kept.measured(lambda: measured(part, options.quick), compiler=compiler, quick=options.quick)
        lines = [*parallel_page.table(part, found["records"]), parallel_page.conditions(found)]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"benchmarks parallel: {part}: {error}", file=sys.stderr, flush=True)
        return False
    options.results.mkdir(parents=True, exist_ok=True)
    _file(options.results, part).write_text(json.dumps(found, indent=1) + "\n")
    print(*lines, "", sep="\n", flush=True)
    return True


def _kept(folder: Path, part: str) -> kept.Record | None:
    file = _file(folder, part)
    return dict(json.loads(file.read_text())) if file.exists() else None


def _file(folder: Path, part: str) -> Path:
    return folder / f"parallel_{part}.json"
