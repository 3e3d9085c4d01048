"""Runs the checks of one peer backend in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_checks(file: Path, backend: str, checks: list[str]) -> dict[str, str]:
    """From each check's name to "" or to what went wrong; a check that the process never reached is said to be so."""
    command = [sys.executable, "-m", "tests.peers.peer_checks", str(file), backend, *checks]
    # Where CI is set, torch makes an error of what is a warning elsewhere (torch/_functorch/config.py,
    # check_custom_op_aliasing), and npugraph_ex calls `.out` operators inside its graph.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=400)
    results = json.loads(file.read_text()) if file.exists() else {}
    lost = f"the process ended with {ended.returncode} before this check:\n{ended.stderr[-4000:]}"
    return {check: results.get(check, lost) for check in checks}
