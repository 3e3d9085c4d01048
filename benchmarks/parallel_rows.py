"""Parts of `python -m benchmarks parallel` that need one rank: `python -m benchmarks.parallel_rows FILE PART QUICK`.

`nz`: the rows of row_nz.py. `streams`: the row of row_streams.py, and a timeline of each of its ways to run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import npu_compiler
from benchmarks import devices, row_nz, row_streams
from benchmarks.harness import Settings, run
from npu_compiler.inspect.timeline import Timeline, timeline

STEPS = 20
"""Steps in a timeline."""
Record = dict[str, Any]


def nz(settings: Settings) -> list[Record]:
    """A record for each product and contestant."""
    found = []
    for row in row_nz.rows():
        torch._dynamo.reset()
        found += [{"title": row.title, **record} for record in run(row, settings)]
    return found


def streams(settings: Settings) -> list[Record]:
    """A record for each contestant; of those on the device with what their timelines show, in microseconds a step."""
    (row,) = row_streams.rows()
    found = {record["peer"]: {"title": row.title, **record} for record in run(row, settings)}
    for name, options in row_streams.WAYS.items():
        found[name]["timeline"] = figures(recorded(row_streams.compiled(options)))
    return list(found.values())


def recorded(step: Callable[[], Tensor]) -> Timeline:
    """The timeline of STEPS steps."""
    wait = devices.wait()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder, "run.json.gz")
        with npu_compiler.trace(file):
            for _ in range(STEPS):
                step()
                wait()
        return timeline(file)


def figures(found: Timeline) -> Record:
    """Microseconds a step, by the timeline: from the first task's start to the last one's end; with work on each
    stream, the busiest first; with work on more than one."""
    busy = sorted((stream.busy for stream in found.streams), reverse=True)
    return {
        "microseconds": found.microseconds / STEPS,
        "busy": [one / STEPS for one in busy if one],
        "together": found.together / STEPS,
    }


def main() -> None:
    target, part, quick = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "quick"
    settings = Settings.quick() if quick else Settings()
    target.write_text(json.dumps({"nz": nz, "streams": streams}[part](settings)))


if __name__ == "__main__":
    main()
