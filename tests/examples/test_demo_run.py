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
    left = [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(train.OUTPUT) in _text(entry)]
    assert not left, "a process of the server is left"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
