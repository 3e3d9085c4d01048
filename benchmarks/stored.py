"""Rows on disk: one JSON file a row, in benchmarks/results/, and the conditions that each is stored with."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torch_npu", "vllm", "transformers", "onnxruntime", "openvino")
"""What is measured, and what with: a ratio to another release is another ratio."""
Row = dict[str, Any]


def about(title: str, quick: bool, threads: int = 1) -> dict[str, Any]:
    """The conditions of a row that is measured now, with so many compute threads."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = {"quick": quick, "threads": threads, "machine": machine(), "versions": versions(), "time": now}
    return {"title": title, **conditions}


def versions() -> dict[str, str]:
    """The release of each of PACKAGES, whichever of them a row loads, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, str]:
    """The kind of machine: processor model, cores, kernel, Python."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        if names:
            model = f"{names[0]} ({len(names)} logical cores)"
    return {"processor": model, "system": platform.platform(), "python": platform.python_version()}


def read(results: Path, name: str) -> Row | None:
    """The stored row `name`, or None. Rows of before call the roof "floor"; they are read all the same."""
    file = results / f"{name}.json"
    if not file.exists():
        return None
    row: Row = json.loads(file.read_text())
    for record in row["records"]:
        if "floor" in record:
            record["roof"] = record.pop("floor")
        if record.get("goal"):
            record["goal"] = record["goal"].replace("% of the floor", "% of the roof")
    return row


def write(results: Path, name: str, row: Row) -> None:
    """Stores a row; an older one stays until the new one is whole."""
    results.mkdir(parents=True, exist_ok=True)
    unfinished = results / f"{name}.json.part"
    unfinished.write_text(json.dumps(row, indent=1) + "\n")
    unfinished.replace(results / f"{name}.json")
