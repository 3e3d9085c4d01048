"""A program that ends while its engine, in the same process, is alive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.models import checkpoints

PROGRAM = """
import sys
from tests.serving.engine import SETTINGS, generate, graphs
from vllm import LLM

folder, report = sys.argv[1:]
llm = LLM(model=folder, **SETTINGS, **graphs("FULL_DECODE_ONLY", [1]), additional_config={"report_path": report})
print("tokens", len(generate(llm, [[1, 2, 3]], 4)[0]), flush=True)
"""


def test_program_ends_without_a_traceback(tmp_path: Path) -> None:
    """The report is written by then, and torch_npu's own hook finds nothing to complain about."""
    folder, report = checkpoints.cached(checkpoints.Shape(family="qwen3")), tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(report)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens 4" in done.stdout
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert json.loads(report.read_text())
