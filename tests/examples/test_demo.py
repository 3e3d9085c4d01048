"""The parts of the demo that need no vLLM: arguments, ports, the life of the server's processes, the printed report."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from pathlib import Path

import pytest

from examples import demo
from npu_compiler import reasons
from npu_compiler.serving.report import GraphRecord, RunReport, Step

# A server like vLLM's in what matters here: it answers /health after a while, and has a child that ignores SIGINT.
SERVER = """
import http.server, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('child up', flush=True); time.sleep(99)"])
print("Starting to load model", flush=True)
time.sleep(0.6)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def start(script: str, log: Path) -> demo.Server:
    address = demo.Address("127.0.0.1", demo.choose_port("127.0.0.1", 0))
    return demo.Server([sys.executable, "-c", script, str(address.port)], address, log)


def test_server_is_awaited_with_progress_and_nothing_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(SERVER, tmp_path / "logs" / "server.log")
    with server:
        assert 0.5 < server.wait_until_healthy(30.0) < 30.0
        assert server.members()
        deadline = time.monotonic() + 10
        while "child up" not in server.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "loading weights" in capsys.readouterr().out
    assert not server.members()


def test_nothing_survives_an_interrupt_either(tmp_path: Path) -> None:
    server = start(SERVER, tmp_path / "server.log")
    with contextlib.suppress(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    assert not server.members()


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import sys; print('ValueError: unknown model type\\nRuntimeError: see above'); sys.exit(3)"
    with start(script, tmp_path / "server.log") as server, pytest.raises(demo.DemoError) as caught:
        server.wait_until_healthy(30.0)
    assert "exit code 3" in str(caught.value) and "first error: ValueError: unknown model type\n" in str(caught.value)


def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    script = "import time; print('still here', flush=True); time.sleep(600)"
    with (
        start(script, tmp_path / "server.log") as server,
        pytest.raises(demo.DemoError, match=r"not up after 1 s .*--timeout"),
    ):
        server.wait_until_healthy(1.0)
    assert not server.members()


def test_port_in_use_is_refused_with_a_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        with pytest.raises(demo.DemoError, match=f"port {taken} on 127.0.0.1 can't be used .*another --port"):
            demo.choose_port("127.0.0.1", taken)
    assert demo.choose_port("127.0.0.1", 0) > 0


def test_missing_model_ends_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "no model at" in capsys.readouterr().err


def test_arguments() -> None:
    options = demo.parse(["--serve", "--", "--max-num-seqs", "4"])
    assert (options.serve, options.port, options.extra) == (True, 8000, ["--max-num-seqs", "4"])
    assert demo.parse([]).port == 0
    assert (demo.parse([]).model / "config.json").is_file()


def test_server_command_passes_the_report_and_the_users_arguments_last() -> None:
    address = demo.Address("127.0.0.1", 1234)
    command = demo.server_command(Path("model"), address, Path("r.json"), ["--max-num-seqs", "4"])
    assert command[-2:] == ["--max-num-seqs", "4"]
    assert json.loads(command[command.index("--additional-config") + 1])["report_path"] == "r.json"


def test_stream_is_timed_from_its_pieces() -> None:
    def pieces():  # type: ignore[no-untyped-def]
        time.sleep(0.05)
        yield "a", None
        time.sleep(0.05)
        yield "b", None
        yield "", 11

    answer = demo.consume(pieces(), show=False)
    assert (answer.text, answer.tokens) == ("ab", 11)
    assert 0.05 <= answer.first_s < answer.total_s
    assert answer.tokens_per_second == pytest.approx(10 / (answer.total_s - answer.first_s))


def test_report_of_the_server_is_rendered() -> None:
    report = RunReport(graphs=[GraphRecord("FULL", 4, 4, 12.5, 0.75, replays=7)])
    report.add(Step(decode=True, mode="FULL", tokens=3, padded_tokens=4, generated=3))
    report.add(Step(decode=False, mode="NONE", tokens=9, padded_tokens=9, generated=1, reason=reasons.PREFILL))
    text = demo.render(json.loads(json.dumps(report.as_dict())))
    for part in (
        "captured    1 in 12 ms, 0.75 MiB",
        "7 replays",
        "1 replayed",
        "1 other steps not replayed whole: prefill",
        "25.0%",
        "4 tokens",
    ):
        assert part in text, text


def test_unreadable_reports_are_named(tmp_path: Path) -> None:
    with pytest.raises(demo.DemoError, match="wrote no report"):
        demo.read_report(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text('{"graphs": [')
    with pytest.raises(demo.DemoError, match="not JSON"):
        demo.read_report(tmp_path / "half.json")
