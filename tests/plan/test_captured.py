"""Plans of several streams inside one captured graph, in the host runtime's checking mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = [
    "check_two_branches_in_one_captured_graph",
    "check_streams_inside_a_capture_of_somebody_else",
    "check_each_shape_has_its_plan",
    "check_shapes_with_outputs_in_one_place_on_two_streams",
    "check_random_programs",
    "check_a_removed_event_is_a_race",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("plan") / "results.json"
    command = [sys.executable, "-m", "tests.plan.captured_checks", str(file)]
    environment = {**os.environ, "NPU_COMPILER_HOST": "check=on", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text()) if file.exists() else {}
    lost = f"the process ended with {ended.returncode} before this check:\n{ended.stderr[-4000:]}"
    return {check: found.get(check, lost) for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS)
def test_captured_plan(check: str, results: dict[str, str]) -> None:
    assert results[check] == "", results[check]
