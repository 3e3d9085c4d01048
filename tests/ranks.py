"""Checks that run inside rank processes of torch.distributed with backend "hccl", and the process that starts them.

A module of checks ends with `main(globals())`. Every `check_*` of it runs, in order, and one test a check reads what
came out: `""`, or what went wrong. A `scenario_*`, which may leave the communicator broken, runs alone.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
Reports = list[tuple[dict[str, str], str]]
"""Of each rank: what came out of the checks, and what it wrote to stderr."""


def checks(module: str) -> list[str]:
    """Names of a module's checks. Read without importing: it brings up torch_npu, which the starter does not need."""
    source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text()
    found = (node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return [name for name in found if name.startswith("check_")]


def start(module: str, folder: Path, *scenario: str, ranks: int = 2) -> Reports:
    """What each rank reports (nothing when it died), and what it wrote to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-m", module, str(folder), str(rank), str(ranks), *scenario] for rank in range(ranks)]
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


def passed(check: str, reports: Reports) -> None:
    """Fails where a rank did not get to a check or did not pass it."""
    for rank, (results, errors) in enumerate(reports):
        assert check in results, f"rank {rank} did not get that far:\n{errors[-3000:]}"
        assert results[check] == "", f"rank {rank}: {results[check]}"


def main(module: dict[str, Any]) -> None:
    """Of a rank's process."""
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    folder, rank, ranks, scenario = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    results = _run_scenario(module, scenario[0]) if scenario else _run_checks(module, torch)
    (folder / f"results.{rank}.json").write_text(json.dumps(results))
    if scenario:
        os._exit(0)  # the communicator has failed: an orderly end would report that once more
    dist.destroy_process_group()


def _run_checks(module: dict[str, Any], torch: Any) -> dict[str, str]:
    results = {}
    for name, check in list(module.items()):
        if name.startswith("check_"):
            try:
                check()
                torch.npu.synchronize()
                results[name] = ""
            except Exception:  # noqa: BLE001  every failure is reported by name, whatever it is
                results[name] = traceback.format_exc()
    return results


def _run_scenario(module: dict[str, Any], name: str) -> dict[str, str]:
    try:
        module[f"scenario_{name}"]()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}
