"""Runs a piece of a test in a Python process of its own: with other settings, or when it breaks its streams."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_program(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `source` (dedented; torch is imported for it) with `environment` added; never raises for its exit code."""
    program = "import torch\n" + textwrap.dedent(source)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, timeout=240
    )


def output_of(source: str, **environment: str) -> str:
    """Standard output of a program that must succeed."""
    result = run_program(source, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
