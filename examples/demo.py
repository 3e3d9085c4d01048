"""Serves the trained model with vLLM on the device `npu`, talks to it with the openai client, and prints a run report.

    python examples/demo.py             one chat, one streaming completion, the counters of /metrics, the run report;
                                        leaves no process behind
    python examples/demo.py --serve     the same, then keeps serving until Ctrl-C

Arguments after `--` go to `vllm serve` as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAINED_MODEL = ROOT / "tests" / "models" / "trained"
LOG = ROOT / "build" / "demo-server.log"
MODEL_NAME = "tiny-qwen3"
QUESTION = "What is an ACL graph?"
COMPLETION_PROMPT = "A captured graph"
MAX_TOKENS = 320
REPORT_INTERVAL_S = 0.5
STOP_GRACE_S = 20.0
# Lines of the server's log worth a progress line: (text in the log, what it means).
MILESTONES = (
    ("Initializing a V1 LLM engine", "engine starts"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "weights loaded"),
    ("ACL graphs (", "graphs captured"),
    ("init engine (", "engine ready"),
    ("Application startup complete", "server is up"),
)


class DemoError(RuntimeError):
    """What went wrong and what to do next, for a person at a terminal."""


def say(text: str = "") -> None:
    print(text, flush=True)


def choose_port(host: str, wanted: int) -> int:
    """`wanted` if it is free, or any free port when `wanted` is 0.

    Raises:
        DemoError: the wanted port is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise DemoError(
                f"port {wanted} on {host} can't be used ({error.strerror}); stop the program that holds it, give "
                "another --port, or leave --port out to take a free one"
            ) from error
        return int(probe.getsockname()[1])


def check_model(folder: Path) -> None:
    """Raises DemoError when `folder` holds no Hugging Face-format model."""
    if not (folder / "config.json").is_file():
        raise DemoError(
            f"no model at {folder}: it has no config.json; give the folder of a Hugging Face-format checkpoint, or "
            "write the trained one anew with `python -m tests.models.train`"
        )


def end_of_log(path: Path, lines: int = 25) -> str:
    """The first error in a server's log, which its later ones follow from, and the last lines."""
    text = path.read_text(errors="replace")
    first = re.search(r"\b\w*(?:Error|Exception): .+", text)
    cause = f"first error: {first.group(0)}\n" if first else ""
    return f"{cause}the end of {path}:\n" + "\n".join(text.splitlines()[-lines:])


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def server_command(model: Path, address: Address, report: Path, extra: Sequence[str]) -> list[str]:
    """The `vllm serve` command line: small limits, so that the whole demo fits a laptop."""
    options = {"report_path": str(report), "report_interval": REPORT_INTERVAL_S}
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", MODEL_NAME,
        "--host", address.host, "--port", str(address.port),
        "--max-model-len", "1024", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(64 << 20),
        "--additional-config", json.dumps(options),
        *extra,
    ]  # fmt: skip


class Server:
    """`vllm serve` in a process group of its own, its output in a file. Use it as a context manager."""

    def __init__(self, command: list[str], address: Address, log: Path) -> None:
        self.address, self.log = address, log
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **os.environ,
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        self.group = self.process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks the server to end, waits, and then ends whatever is left of its process group."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_GRACE_S)
        if not self.gone_within(5.0):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self.process.wait()
            self.gone_within(5.0)

    def gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.members()

    def members(self) -> list[int]:
        """The running processes of the server's group: a child that outlived the server counts, a zombie does not."""
        self.process.poll()
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # "pid (name) state parent group ...", where the name may hold anything, brackets too.
                state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.group and state != "Z":
                    found.append(int(entry.parent.name))
        return found

    def healthy(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def get(self, path: str) -> str:
        """What the server answers to GET.

        Raises:
            OSError: there is no answer within two seconds, or its status is an error's.
        """
        # No proxy from the environment: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.address.url}{path}", timeout=2.0) as reply:
            return str(reply.read().decode())

    def wait_until_healthy(self, timeout: float) -> float:
        """Waits for `/health`, with a progress line per milestone; returns the seconds it took.

        Raises:
            DemoError: the server ended, or `timeout` seconds passed; the message holds the end of its log.
        """
        began, shown = time.monotonic(), 0
        while not self.healthy():
            waited = time.monotonic() - began
            code = self.process.poll()
            if code is not None:
                raise DemoError(f"the server ended with exit code {code} after {waited:.0f} s; {end_of_log(self.log)}")
            if waited > timeout:
                raise DemoError(f"the server is not up after {timeout:.0f} s (--timeout); {end_of_log(self.log)}")
            reached = milestones_in(self.log.read_text(errors="replace"))
            for name in reached[shown:]:
                say(f"  {waited:5.1f} s  {name}")
            shown = len(reached)
            time.sleep(0.25)
        return time.monotonic() - began


def milestones_in(log: str) -> list[str]:
    """The milestones that `log` has reached, in the order of MILESTONES."""
    return [name for text, name in MILESTONES if text in log]


@dataclass(frozen=True)
class Answer:
    """What the server wrote: text, tokens, and seconds from the request to the first and the last token."""

    text: str
    tokens: int
    first_s: float
    total_s: float

    @property
    def tokens_per_second(self) -> float:
        """The rate of the decode steps: the first token belongs to the prefill."""
        steps, seconds = self.tokens - 1, self.total_s - self.first_s
        return steps / seconds if steps > 0 and seconds > 0 else 0.0


def consume(pieces: Iterator[tuple[str, int | None]], show: bool) -> Answer:
    """Reads a stream of (text, completion tokens so far or None), printing the text as it comes when `show`."""
    began = time.perf_counter()
    first: float | None = None
    text, tokens = "", 0
    for piece, counted in pieces:
        if piece and first is None:
            first = time.perf_counter()
        if show:
            print(piece, end="", flush=True)
        text += piece
        tokens = counted if counted is not None else tokens
    ended = time.perf_counter()
    return Answer(text, tokens, (first or ended) - began, ended - began)


def chat(client: Any, question: str) -> Answer:
    """One chat turn, greedy, not streamed."""
    began = time.perf_counter()
    reply = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )
    seconds = time.perf_counter() - began
    return Answer(reply.choices[0].message.content or "", reply.usage.completion_tokens, 0.0, seconds)


def complete(client: Any, prompt: str) -> Answer:
    """One streaming completion, greedy, printed as it arrives."""
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )

    def pieces() -> Iterator[tuple[str, int | None]]:
        for chunk in stream:
            counted = chunk.usage.completion_tokens if chunk.usage else None
            yield (chunk.choices[0].text if chunk.choices else ""), counted

    return consume(pieces(), show=True)


def talk(address: Address) -> None:
    """Asks for the chat and the completion, and prints both.

    Raises:
        DemoError: an answer came back empty.
    """
    import openai

    client = openai.OpenAI(
        base_url=f"{address.url}/v1",
        api_key="none",
        timeout=120.0,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    say(f"\nchat\n  user:       {QUESTION}")
    answer = chat(client, QUESTION)
    say(f"  assistant:  {answer.text}")
    say(f"  ({answer.tokens} tokens in {answer.total_s:.2f} s)")
    say("\nstreaming completion")
    print(f"  {COMPLETION_PROMPT}", end="", flush=True)
    written = complete(client, COMPLETION_PROMPT)
    limit = ", its limit" if written.tokens >= MAX_TOKENS else ""
    say(
        f"\n  ({written.tokens} tokens{limit}; the first after {written.first_s * 1e3:.0f} ms, "
        f"then {written.tokens_per_second:.0f} tokens/s)"
    )
    if not answer.text.strip() or not written.text.strip():
        raise DemoError("the server answered with an empty text; see its log")


def counters(metrics: str) -> list[str]:
    """The plugin's counters among those of `/metrics`: steps by kind and reason, replayed tokens and their padding."""
    return [line for line in metrics.splitlines() if re.match(r"npu_compiler:\w+_total\b", line)]


def read_report(path: Path) -> dict[str, Any]:
    """The run report that rank 0 wrote.

    Raises:
        DemoError: there is none, or it is not JSON.
    """
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DemoError(f"the server wrote no report to {path}; see its log") from error
    except json.JSONDecodeError as error:
        raise DemoError(f"the report {path} is not JSON: {error}") from error
    if not isinstance(report, dict):
        raise DemoError(f"the report {path} holds a {type(report).__name__}, expected an object")
    return report


def render(report: dict[str, Any]) -> str:
    """The report as lines for a terminal; the fields are those of `npu_compiler.serving.report.RunReport.as_dict`."""
    graphs, decode, other = report["graphs"], report["decode_steps"], report["other_steps"]
    lines = [
        f"  graphs captured    {len(graphs)} in {report['capture_milliseconds']:.0f} ms, "
        f"{report['capture_mebibytes']:.2f} MiB",
    ]
    lines += [
        f"    {graph['mode']:9s} {graph['tokens']:4d} tokens  {graph['milliseconds']:8.1f} ms  "
        f"{graph['mebibytes']:7.2f} MiB  {graph['replays']:5d} replays"
        for graph in graphs
    ]
    for name, steps in (("decode steps", decode), ("prefill and mixed", other)):
        lines.append(
            f"  {name:18s} {steps['total']}: {steps['replayed']} replayed, {steps['piecewise']} piecewise, "
            f"{steps['eager']} eager"
        )
    lines += [
        f"    {group['steps']} {group['kind']} steps not replayed whole: {group['reason']} {group['detail']}".rstrip()
        for group in report["not_replayed"]
    ]
    lines.append(f"  padding waste      {report['padding_waste']:.1%} of the replayed tokens")
    lines.append(
        f"  throughput         {report['generated_tokens']} tokens in {report['serving_seconds']:.2f} s: "
        f"{report['tokens_per_second']:.0f} tokens/s, prefill and gaps between steps included"
    )
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    own, extra = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, extra = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="examples/demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=TRAINED_MODEL, help="checkpoint folder (default: the trained one)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=None, help="port (default: a free one; with --serve 8000)")
    parser.add_argument("--serve", action="store_true", help="keep serving afterwards, until Ctrl-C")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds to wait for the server (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, default=LOG, help="file for the server's log (default: %(default)s)")
    options = parser.parse_args(own)
    options.extra = extra
    if options.port is None:
        options.port = 8000 if options.serve else 0
    return options


def end_like_interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM takes the same way out as Ctrl-C, so that the server is stopped too."""
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> None:
    """Starts the server, talks to it, serves on if asked, stops it, and prints its report.

    Raises:
        DemoError: anything that keeps the demo from showing what it should.
    """
    check_model(options.model)
    address = Address(options.host, choose_port(options.host, options.port))
    with tempfile.TemporaryDirectory(prefix="npu_compiler_demo_") as scratch:
        report = Path(scratch) / "report.json"
        say(f"vllm serve {options.model} on {address.url}, log in {options.log}")
        server = Server(server_command(options.model, address, report, options.extra), address, options.log)
        with server:
            say(f"  {server.wait_until_healthy(options.timeout):5.1f} s  answers /health")
            talk(address)
            say(f"\ncounters of {address.url}/metrics")
            say("\n".join(f"  {line}" for line in counters(server.get("/metrics"))))
            if options.serve:
                serve_on(server)
        if server.members():
            raise DemoError(f"processes {server.members()} of the server are left; end them with kill")
        say("\nrun report")
        say(render(read_report(report)))


def serve_on(server: Server) -> None:
    """Returns on Ctrl-C.

    Raises:
        DemoError: the server ended by itself.
    """
    say(f"\nserving on {server.address.url}/v1 as model {MODEL_NAME!r}; Ctrl-C ends it")
    try:
        server.process.wait()
    except KeyboardInterrupt:
        say("\nstopping")
        return
    raise DemoError(f"the server ended by itself; {end_of_log(server.log)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 when everything worked, 1 with a message on stderr when not, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, end_like_interrupt)
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(options)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("\nstopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
