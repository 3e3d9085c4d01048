"""A process that runs programs of bundles for another one, so that a crash or a hang is an answer too.

Requests and answers are lines of JSON. On the host runtime it runs in the checking mode, which delays streams at random
and reports accesses that nothing orders; on a card the variable means nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from npu_compiler.config import Options
from npu_compiler.errors import BundleError, OptionError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.outcome import Outcome, Point
from npu_compiler.inspect.program import Data, Program
from npu_compiler.inspect.replay import FAILURES, MEMORY, Subject, options_of, surroundings_of
from npu_compiler.inspect.values import Values

TIMEOUT = 300.0
"""Seconds without an answer after which a program counts as hanging."""
CHECKING = "check=on,delay_us=400"
SETTINGS = "NPU_COMPILER_HOST"
FINDING = "[host runtime] check: "


class Source(Data):
    """What is run, by names.

    Attributes:
        bundle, graph: where it is.
        program: a program that was made of the graph's, to be run in its place, with made-up inputs.
        options: in place of the bundle's, as torch.compile takes them.
        made_up: whether saved inputs are left alone.
    """

    bundle: str
    graph: str = ""
    program: Program | None = None
    options: dict[str, Any] | None = None
    made_up: bool = False

    def open(self) -> StoredGraph:
        """The graph of the bundle."""
        return bundle.open(self.bundle).graph(self.graph)

    def chosen(self) -> Options:
        """The options to compile with."""
        return Options.of(self.options) if self.options is not None else options_of(self.open())


class Worker:
    """Runs points in a child process, which is started when it is needed and again after a crash or a hang.

    Args:
        imports: modules to import first: those that register operators, say.

    Attributes:
        timeout: seconds an answer may take, the start of the process included.
    """

    def __init__(self, imports: Sequence[str] = (), timeout: float = TIMEOUT) -> None:
        self._imports, self.timeout = tuple(imports), timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = b""
        self._read = -1
        self._errors: list[str] = []

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, subject: Source, point: Point) -> Outcome:
        """What comes of a point.

        Raises:
            OptionError: a rule or pass that the options or the point name is not there; nothing has run then.
        """
        return self._asked({"run": [subject.model_dump(), point.model_dump()]})

    def run_file(self, file: Path) -> Outcome:
        """What comes of a test that `minify` wrote."""
        return self._asked({"file": str(file)})

    def program_at(self, subject: Source, point: Point) -> Program:
        """The program at a point, before it is captured.

        Raises:
            BundleError: the passes fail before it.
        """
        outcome = self._asked({"program": [subject.model_dump(), point.model_dump()]})
        if not outcome.right:
            raise BundleError(f"the program before can't be made: {outcome.text}")
        return Program.model_validate_json(outcome.text)

    def _asked(self, request: dict[str, Any]) -> Outcome:
        process = self._started()
        try:
            assert process.stdin is not None
            process.stdin.write((json.dumps(request) + "\n").encode())
            process.stdin.flush()
        except BrokenPipeError:
            return self._crashed()
        line = self._line()
        if line is None:
            self.close()
            return Outcome(state="hang", text=f"no answer in {self.timeout:.0f} seconds", kind="hang")
        if not line:
            return self._crashed()
        answer = json.loads(line)
        if "refused" in answer:
            what, *more = answer["refused"]
            raise OptionError(what, **dict(zip(("where", "rule", "fix"), more, strict=True)))
        if answer["broken"]:
            self.close()
        outcome = Outcome.model_validate(answer["outcome"])
        races = any(entry.what == MEMORY for entry in outcome.differences)
        return outcome.model_copy(update={"said": self._said()}) if races else outcome

    def _said(self) -> tuple[str, ...]:
        """The last findings of the checking mode; the thread that reads them may be a moment behind."""
        time.sleep(0.05)
        found = [line.partition(FINDING)[2] for line in self._errors if FINDING in line]
        return tuple(dict.fromkeys(found[-3:]))

    def close(self) -> None:
        """Ends the child and whatever it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._read)
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        self._read, write = os.pipe()
        settings = ",".join(part for part in (os.environ.get(SETTINGS, ""), CHECKING) if part)
        path = os.pathsep.join(entry for entry in sys.path if entry)  # rules given by name are found as they are here
        environment = {**os.environ, SETTINGS: settings, "PYTHONPATH": path}
        for name in ("NPU_COMPILER_DUMP",):
            environment.pop(name, None)
        command = [sys.executable, "-m", "npu_compiler.inspect.worker", str(write), *self._imports]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[write],
            env=environment,
            start_new_session=True,
        )
        os.close(write)
        self._answers, self._errors = b"", []
        threading.Thread(target=_drain, args=(self._process.stderr, self._errors), daemon=True).start()
        return self._process

    def _line(self) -> bytes | None:
        """The next answer; empty where the child has ended, None where it takes too long."""
        while b"\n" not in self._answers:
            ready, _, _ = select.select([self._read], [], [], self.timeout)
            if not ready:
                return None
            part = os.read(self._read, 1 << 16)
            if not part:
                return b""
            self._answers += part
        line, _, self._answers = self._answers.partition(b"\n")
        return line

    def _crashed(self) -> Outcome:
        assert self._process is not None
        code = self._process.wait()
        told = "; ".join(line for line in self._errors[-3:])
        self.close()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(state="crash", text=f"the process ended by {name}: {told[-500:]}", kind=name)


def _drain(pipe: Any, into: list[str]) -> None:
    try:
        for line in pipe:
            into.append(line.decode(errors="replace").rstrip())
            del into[:-50]
    except ValueError:  # closed
        pass


def _subject(source: Source) -> Subject:
    graph, options = source.open(), source.chosen()
    ranks = bundle.open(source.bundle).header.environment.ranks
    if source.program is not None:
        around = surroundings_of(graph, made_up=True)
        return Subject(
            source.program, graph.constants(), options, Values(source.program), ranks=ranks, surroundings=around
        )
    return Subject.of(graph, options, ranks, source.made_up)


def main(arguments: Sequence[str]) -> None:
    """The child: answers requests until its input ends."""
    answers, imports = int(arguments[0]), arguments[1:]
    for name in imports:
        importlib.import_module(name)
    with os.fdopen(answers, "w") as out:
        _answer(sys.stdin, out)


def _answer(requests: TextIO, out: TextIO) -> None:
    known = _Known()
    for line in requests:
        try:
            outcome = known.outcome(json.loads(line))
            answer = {"outcome": outcome.model_dump(mode="json"), "broken": _is_broken()}
        except OptionError as error:
            answer = {"refused": [error.what, error.where, error.rule, error.fix]}
        except FAILURES as error:
            name = type(error).__name__
            outcome = Outcome(state="error", text=f"{name}: {error}", kind=f"request {name}")
            answer = {"outcome": outcome.model_dump(mode="json"), "broken": _is_broken()}
        out.write(json.dumps(answer) + "\n")
        out.flush()


class _Known:
    """The subject of the last request, which most likely is that of the next."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._subject: Subject | None = None

    def outcome(self, request: dict[str, Any]) -> Outcome:
        """The answer to a request."""
        if "file" in request:
            found: Outcome = runpy.run_path(request["file"])["outcome"]()
            return found
        ((kind, (named, pointed)),) = request.items()
        source, point = Source.model_validate(named), Point.model_validate(pointed)
        if self._subject is None or self._source != source:
            self._subject, self._source = _subject(source), source
        if kind == "run":
            return self._subject.run(point)
        return Outcome(state="right", text=self._subject.program_at(point).model_dump_json(exclude_defaults=True))


def _is_broken() -> bool:
    """Whether the device has failed: an error stays with its stream, so the next program needs another process."""
    try:
        torch.npu.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
