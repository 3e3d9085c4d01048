"""The rows of `python -m benchmarks compiler` on disk: one JSON file a model, in it each part with its conditions.

A part is measured and kept as a whole, so that a run can be made in pieces, or go on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cpu

Record = dict[str, Any]


def measured(make: Callable[[], list[Record]], **about: Any) -> Record:
    """A part as it is kept: the records that `make` returns and, in `about`, the conditions they were made under."""
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    before = cpu.Use.until_now()
    records = make()
    use = cpu.Use.until_now().since(before)
    about |= {"time": made_at, "seconds": round(use.seconds, 1), "cpu": round(use.own, 1)}
    about |= {"others": round(use.others, 3)}
    return {"about": about, "records": records}


def together(one: Record, two: Record) -> Record:
    """The conditions of a part that was measured in two pieces."""
    seconds = one["seconds"] + two["seconds"]
    others = (one["others"] * one["seconds"] + two["others"] * two["seconds"]) / seconds if seconds else 0.0
    return one | {"seconds": seconds, "cpu": one["cpu"] + two["cpu"], "others": round(others, 3)}


def loaded(part: Record) -> bool:
    """Whether other programs worked beside a part."""
    return bool(part["about"]["others"] > cpu.LOADED)


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
