"""`python -m tests.serving.pairs` (`make pairs`): starts engines until every legal pair of features was tried.

A start has as many features on as go together, so that few starts try all pairs; after one that did not give the right
tokens, its pairs are started one by one. Rows are kept in benchmarks/results/pairs, one JSON file a start: a run that
was stopped goes on where it was. The page docs/parallel_pairs.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep.__main__ import ROOT, Worker
from tests.serving.pairs.page import EQUAL, page, states
from tests.serving.pairs.plan import Pair, Start, covering, pairs, pairs_of, refusal

RESULTS = ROOT / "benchmarks" / "results" / "pairs"
PAGE = ROOT / "docs" / "parallel_pairs.md"
COMMAND = (sys.executable, "-m", "tests.serving.pairs.start")
Rows = dict[str, dict[str, Any]]


def waiting(rows: Rows, again: str | None, compiler: str) -> list[Start]:
    """The starts that are still to be made, most telling first."""
    if again == "all":
        kept: Rows = {}
    elif again == "stale":
        kept = {name: row for name, row in rows.items() if row["compiler"] == compiler}
    elif again == "failed":
        kept = {name: row for name, row in rows.items() if row["outcome"] == EQUAL}
    else:
        kept = rows
    known = states(list(kept.values()), {})
    legal = [pair for pair in pairs() if not refusal(pair.start) and known[pair] == "not run"]
    suspect = {pair for row in kept.values() if row["outcome"] != EQUAL for pair in pairs_of(Start.parse(row["start"]))}
    together = list(covering([pair for pair in legal if pair not in suspect]))
    return list(dict.fromkeys([*together, *(pair.start for pair in legal if pair in suspect)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every start that was made gave the right tokens, and start-up refuses what it has to."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.pairs", description=__doc__)
    parser.add_argument("starts", nargs="*", help="starts as --list names them (default: all that pairs wait for)")
    parser.add_argument("--again", choices=["failed", "stale", "all"], help="run these too although they have a row")
    parser.add_argument("--list", action="store_true", help="print the starts that would be made, make none")
    parser.add_argument("--page", action="store_true", help="start nothing, write the page from the rows there are")
    parser.add_argument("--most", type=int, default=1000, metavar="N", help="make at most N starts now")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds a start may take (default: %(default)s)")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    refusals, compiler = _start_up()
    wrong = [pair for pair in pairs() if not _as_declared(pair, refusals.get(pair, ""))]
    for pair in wrong:
        print(f"{pair}: start-up says {refusals.get(pair, 'nothing')!r}, expected {refusal(pair.start)!r}")
    starts = [Start.parse(name) for name in options.starts] or waiting(_rows(), options.again, compiler)
    if options.list:
        print(*starts, sep="\n")
        return int(bool(wrong))
    failed = False
    if not options.page:
        failed = _run(starts[: options.most], options.timeout, compiler)
        while not options.starts and not options.most < len(starts):
            starts = waiting(_rows(), None, compiler)
            if not starts:
                break
            failed |= _run(starts, options.timeout, compiler)
    PAGE.write_text(page(list(_rows().values()), refusals, compiler))
    return int(failed or bool(wrong))


def _run(starts: Iterable[Start], timeout: float, compiler: str) -> bool:
    """Makes the starts and keeps their rows; whether one did not give the right tokens."""
    worker, failed, todo = Worker(timeout, COMMAND), False, list(starts)
    try:
        for number, start in enumerate(todo, start=1):
            found = {"seconds": timeout} | worker.row(str(start)) | {"start": str(start), "compiler": compiler}
            _file(start).write_text(json.dumps(found, indent=1) + "\n")
            failed |= found["outcome"] != EQUAL
            reason = f": {found['reason'][:300]}" if found["reason"] else ""
            print(f"[{number}/{len(todo)}] {start}: {found['outcome']}{reason} ({found['seconds']:.0f} s)", flush=True)
    finally:
        worker.stop()
    return failed


def _rows() -> Rows:
    """The rows that are kept, the earliest first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda file: file.stat().st_mtime)
    found = [json.loads(file.read_text()) for file in files]
    return {row["start"]: row for row in found if _is_known(row["start"])}


def _is_known(name: str) -> bool:
    """Whether features of a row still have these names."""
    return str(Start.parse(name)) == name


def _file(start: Start) -> Path:
    return RESULTS / f"{str(start).replace(':', '.').replace('=', '')}.json"


def _as_declared(pair: Pair, said: str) -> bool:
    expected = refusal(pair.start)
    return bool(re.search(expected, said)) if expected else not said


def _start_up() -> tuple[dict[Pair, str], str]:
    """What start-up refuses, and the compiler's fingerprint, asked for in a process of its own (it imports vLLM)."""
    command = [sys.executable, "-m", "tests.serving.pairs.refusals"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    refused, compiler = json.loads(done.stdout.splitlines()[-1])
    return {Pair(*names): text for *names, text in refused}, compiler


if __name__ == "__main__":
    sys.exit(main())
