"""`vllm serve` on two ranks of which one is killed or stops answering: it is named, the request ends with an error, and
no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.models import checkpoints

pytestmark = pytest.mark.full
START_S, END_S, EXEC_TIMEOUT_S = 400, 120, 5


class Server:
    """A server in a session of its own, so that what is left of it can be listed."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(folder),
            "--port",
            str(self.port),
            "--tensor-parallel-size",
            "2",
        ]
        command += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "m"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HCCL_EXEC_TIMEOUT": str(EXEC_TIMEOUT_S)}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", "-cc.cudagraph_capture_sizes=[1]", "--max-num-seqs", "1"],
            env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> dict[int, str]:
        """Those of the server that still run, by id, with their command lines."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (OSError, IndexError, ValueError):
                continue  # it has ended meanwhile
            if session == self.process.pid and name:
                found[int(folder.name)] = name
        return found

    def worker(self, rank: int) -> int:
        """The process of a rank, under the name that vLLM gives it."""
        (found,) = [pid for pid, name in self.processes().items() if f"Worker_TP{rank}" in name]
        return found

    def ask(self, tokens: int) -> str:
        """What becomes of a request for so many tokens: its text, or the error."""
        body = {"model": "m", "prompt": "a", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=END_S) as answer:
                return str(json.loads(answer.read())["choices"][0]["text"])
        except (urllib.error.URLError, OSError) as error:
            return f"error: {error}"

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"{what} took longer than {seconds} s\n{self.text()[-3000:]}"
            time.sleep(0.2)

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def text(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(checkpoints.cached(checkpoints.Shape(max_positions=2048)), tmp_path / "log")
    try:
        found.wait(found.is_up, START_S, "the start")
        yield found
    finally:
        found.stop()


@pytest.mark.parametrize(
    ("blow", "message"),
    [
        (signal.SIGKILL, "cannot finish: rank 1 (pid {pid}) is dead"),
        (signal.SIGSTOP, "s (HCCL_EXEC_TIMEOUT) for rank 1 (pid {pid}), which is alive but has not come"),
    ],
    ids=["killed", "stopped"],
)
def test_a_rank_that_fails_in_the_middle_of_a_step(server: Server, blow: signal.Signals, message: str) -> None:
    assert not server.ask(4).startswith("error")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(server.ask(2000)))
    asking.start()
    time.sleep(0.5)
    culprit = server.worker(1)
    os.kill(culprit, blow)
    begin = time.monotonic()
    asking.join(END_S)
    server.wait(lambda: server.process.poll() is not None, END_S, "the end of the server")
    assert server.process.returncode >= 0, "the server was killed"  # 0: vLLM ends as if it had been told to
    server.wait(lambda: not server.processes(), 30, f"the end of {server.processes()}")
    assert answers and answers[0].startswith("error"), answers
    assert message.format(pid=culprit) in server.text(), server.text()[-3000:]
    assert time.monotonic() - begin < EXEC_TIMEOUT_S + 60
