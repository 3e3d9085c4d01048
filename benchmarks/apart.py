"""One measurement in a process of its own, so that graphs and compilers of one backend do not meet those of another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 600


def measured(arguments: Sequence[str], target: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """What `python ARGUMENTS`, run in the repository, writes to `target` as JSON; `missing` with the reason if it
    writes nothing."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"no result within {TIMEOUT_S} s"}
    if not target.exists():
        lines = [line for line in done.stdout.splitlines() if "Error" in line]
        return {"missing": (lines or [f"exit code {done.returncode}"])[-1][:300]}
    return dict(json.loads(target.read_text()))
