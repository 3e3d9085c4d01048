"""torch.distributed with backend "hccl" of the unmodified torch_npu: two processes against torch on the CPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULE = Path(__file__).with_name("process_group_checks.py")
# Read without importing: the module brings up torch_npu, which this process does not need.
CHECKS = [
    node.name
    for node in ast.parse(MODULE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


def run_ranks(folder: Path, *scenario: str) -> list[tuple[dict[str, str], str]]:
    """What each of two ranks reports (nothing when it died), and what it wrote to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-m", "tests.runtime.process_group_checks", str(folder), str(rank), "2", *scenario]
        for rank in range(2)
    ]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE)
        for command in commands
    ]  # fmt: skip
    reports = []
    for rank, process in enumerate(processes):
        try:
            _, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        file = folder / f"results.{rank}.json"
        reports.append((json.loads(file.read_text()) if file.exists() else {}, errors))
    return reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, str], str]]:
    return run_ranks(tmp_path_factory.mktemp("process_group"))


@pytest.mark.parametrize("check", CHECKS)
def test_process_group(check: str, reports: list[tuple[dict[str, str], str]]) -> None:
    for rank, (results, errors) in enumerate(reports):
        assert check in results, f"rank {rank} did not get that far:\n{errors[-3000:]}"
        assert results[check] == "", f"rank {rank}: {results[check]}"


def test_dead_peer_is_a_runtime_error_that_names_it(tmp_path: Path) -> None:
    begin = time.monotonic()
    (survivor, errors), (dead, _) = run_ranks(tmp_path, "dead_peer")
    assert dead == {}
    assert "rank 1 (pid " in survivor["error"] and "is dead" in survivor["error"], survivor["error"] + errors[-2000:]
    assert time.monotonic() - begin < 120, "HCCL_EXEC_TIMEOUT is 1836 s: the death itself must be noticed"


def test_mismatch_is_a_runtime_error_on_both_ranks(tmp_path: Path) -> None:
    for results, errors in run_ranks(tmp_path, "mismatch"):
        assert "count 8" in results["error"] and "count 9" in results["error"], results["error"] + errors[-2000:]
