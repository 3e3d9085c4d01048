"""`python -m benchmarks.sweep`: runs what has no row yet, two processes at a time, and writes the table.

Rows are kept in benchmarks/results/sweep, one JSON file an architecture: a sweep that was stopped goes on where it was.
A model that crashes or hangs costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep import table

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sweep"
TABLE = ROOT / "docs" / "sweep.md"
COMMAND = (sys.executable, "-m", "benchmarks.sweep.worker")


class Worker:
    """A process that runs models one after the other; it is replaced when a model failed, crashed or hung."""

    def __init__(self, timeout: float, command: Sequence[str] = COMMAND) -> None:
        self._timeout, self._command = timeout, command
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def row(self, architecture: str) -> dict[str, Any]:
        """The row of one architecture; a crash or a timeout is a row too."""
        from benchmarks.sweep.worker import ROW

        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(architecture + "\n")
        process.stdin.flush()
        tail: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=self._timeout)
            except queue.Empty:
                self.stop()
                return _failed(architecture, f"no result within {self._timeout:g} s", tail)
            if line is None:
                code = process.wait()
                self.stop()
                return _failed(architecture, f"the process ended with code {code}", tail)
            if line.startswith(ROW):
                found = dict(json.loads(line.removeprefix(ROW)))
                if found["outcome"] not in ("equal", "different"):
                    self.stop()  # whatever the failure left behind goes with the process
                return found
            tail = [*tail[-30:], line.rstrip()]

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _failed(architecture: str, reason: str, tail: list[str]) -> dict[str, Any]:
    row = {"architecture": architecture, "model_type": "", "outcome": "crashed", "reason": reason}
    return row | {"traceback": "\n".join(tail)}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every architecture that runs eagerly also runs compiled with equal tokens."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures (default: all without a row)")
    parser.add_argument("--again", choices=["failed", "stale", "all"], help="run these too although they have a row")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds a model may take (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing, write docs/sweep.md from the rows there are")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    subjects, without, compiler = _subjects()
    unknown = set(options.names) - set(subjects)
    if unknown:
        parser.error(f"no architecture {sorted(unknown)[0]!r} with a configuration in transformers")
    if not options.table:
        _run(options.names or [name for name in subjects if _wanted(name, options.again, compiler)], options)
    rows = [json.loads(path.read_text()) for path in map(_file, subjects) if path.exists()]
    waiting = [name for name in subjects if not _file(name).exists()]
    TABLE.write_text(table.page(rows, waiting, without, compiler))
    print(table.summary(rows))
    return int(any(row["outcome"] in ("different", "compiled fails") for row in rows))


def _run(names: Sequence[str], options: argparse.Namespace) -> None:
    waiting: queue.Queue[str] = queue.Queue()
    for name in names:
        waiting.put(name)
    done = iter(range(1, len(names) + 1))
    lock = threading.Lock()

    def serve() -> None:
        worker = Worker(options.timeout)
        try:
            while True:
                name = waiting.get_nowait()
                row = worker.row(name)
                _file(name).write_text(json.dumps(row, indent=1) + "\n")
                with lock:
                    reason = f": {row['reason'][:150]}" if row["reason"] else ""
                    print(f"[{next(done)}/{len(names)}] {name}: {row['outcome']}{reason}", flush=True)
        except queue.Empty:
            pass
        finally:
            worker.stop()

    threads = [threading.Thread(target=serve) for _ in range(min(options.processes, max(1, len(names))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _subjects() -> tuple[list[str], list[str], str]:
    """Architectures with and without a configuration in transformers, and the compiler's fingerprint, asked for in a
    process of its own (it imports vLLM)."""
    code = (
        "import json; from benchmarks.sweep import shrink; from npu_compiler.backend import fingerprint; "
        "found, without = shrink.subjects(); "
        "print('\\n' + json.dumps([[one.architecture for one in found], without, fingerprint()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found, without, compiler = json.loads(done.stdout.splitlines()[-1])
    return list(found), list(without), str(compiler)


def _wanted(name: str, again: str | None, compiler: str) -> bool:
    path = _file(name)
    if not path.exists() or again == "all":
        return True
    row = json.loads(path.read_text())
    failed, stale = row["outcome"] != "equal", row.get("compiler") != compiler
    return {"failed": failed, "stale": stale, None: False}[again]


def _file(name: str) -> Path:
    return RESULTS / f"{name}.json"


if __name__ == "__main__":
    sys.exit(main())
