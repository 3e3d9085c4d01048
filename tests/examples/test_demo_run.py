"""The demo as a user runs it: real vLLM, the trained model, the device `npu`. One to two minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import train

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.full
@pytest.mark.timeout(900)
def test_demo_talks_reports_and_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--log", str(log)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert dict(train.questions())["What is an ACL graph?"] in done.stdout
    assert "A captured graph knows its shapes. A batch of three requests cannot run" in done.stdout
    steps = re.search(r"decode steps +(\d+): (\d+) replayed, 0 piecewise, 0 eager", done.stdout)
    assert steps and int(steps[1]) == int(steps[2]) > 500, done.stdout
    assert counted(done.stdout, "steps_total", kind="decode", mode="FULL") == int(steps[2])
    prompts = re.search(r"prefill and mixed +(\d+): 0 replayed, 0 piecewise, (\d+) eager", done.stdout)
    assert prompts and int(prompts[1]) == int(prompts[2])
    assert counted(done.stdout, "steps_total", kind="other", mode="NONE", reason="prefill") == int(prompts[2])
    assert counted(done.stdout, "replayed_tokens_total") == int(steps[2]), "one request at a time"
    left = [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(train.OUTPUT) in _text(entry)]
    assert not left, "a process of the server is left"


def counted(printed: str, name: str, **labels: str) -> int:
    """A counter of the server's /metrics, whose lines the demo prints: the API server's, of what the engine's process
    did."""
    values = []
    for line in printed.splitlines():
        found = re.fullmatch(rf" *npu_compiler:{name}{{(.*)}} (\S+)", line)
        if found and {f'{key}="{value}"' for key, value in labels.items()} <= set(found[1].split(",")):
            values.append(float(found[2]))
    (value,) = values
    return int(value)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
