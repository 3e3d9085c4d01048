"""The rows of `python -m benchmarks compiler` on disk: one JSON file a model, in it each part with its conditions.

A part is measured and kept as a whole, so that a run can be made in pieces, or go on where it was stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LOADED = 0.1
"""Above this share of the machine's cores that other programs took, times of a part are rough."""


def measured(make: Callable[[], list[Record]], **about: Any) -> Record:
    """A part as it is kept: the records that `make` returns and, in `about`, the conditions they were made under."""
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start, busy, own = time.perf_counter(), _busy(), _own()
    records = make()
    seconds = time.perf_counter() - start
    cpu = _own() - own
    others = max(0.0, _busy() - busy - cpu) / (seconds * (os.cpu_count() or 1))
    about |= {"time": made_at, "seconds": round(seconds, 1), "cpu": round(cpu, 1), "others": round(others, 3)}
    return {"about": about, "records": records}


def together(one: Record, two: Record) -> Record:
    """The conditions of a part that was measured in two pieces."""
    seconds = one["seconds"] + two["seconds"]
    others = (one["others"] * one["seconds"] + two["others"] * two["seconds"]) / seconds if seconds else 0.0
    return one | {"seconds": seconds, "cpu": one["cpu"] + two["cpu"], "others": round(others, 3)}


def loaded(part: Record) -> bool:
    """Whether other programs worked beside a part."""
    return bool(part["about"]["others"] > LOADED)


def read(folder: Path, model: str) -> dict[str, Record]:
    """The parts that are kept of `model`, by name."""
    file = _file(folder, model)
    return dict(json.loads(file.read_text())["parts"]) if file.exists() else {}


def write(folder: Path, model: str, name: str, part: Record) -> None:
    """Keeps a part; the others of `model` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model": model, "parts": read(folder, model) | {name: part}}
    _file(folder, model).write_text(json.dumps(found, indent=1) + "\n")


def is_current(part: Record | None, compiler: str, depths: Sequence[int]) -> bool:
    """Whether a part was measured for this state of the compiler and these depths."""
    return part is not None and (part["about"]["compiler"], part["about"]["depths"]) == (compiler, list(depths))


def _file(folder: Path, model: str) -> Path:
    return folder / f"compiler_{model}.json"


def _busy() -> float:
    """CPU seconds of all programs of the machine since it started."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
