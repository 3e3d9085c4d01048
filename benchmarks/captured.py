"""What lies in captured graphs, whoever captured them: torch_npu's NPUGraph prints its tasks on request."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CONTROL = ("EVENT", "MEM_WAIT", "MEM_WRITE")
"""Types of tasks that order streams and move no data."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of one captured graph.

    Attributes:
        kernels: names of the tasks that compute or move data, in the order of their capture.
        control: how many other tasks there are (events and values that order streams).
    """

    kernels: tuple[str, ...]
    control: int


def graphs() -> list[Any]:
    """Every NPUGraph that is alive, whichever backend made it."""
    gc.unfreeze()  # vLLM freezes what is alive after its captures, and the collector lists no frozen objects
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is torch.npu.NPUGraph]


def tasks(graph: Any) -> Tasks:
    """The tasks of a captured NPUGraph.

    Raises:
        RuntimeError: the graph is empty, or was reset.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "graph.json"
        graph.debug_dump(str(target))
        if not target.exists():
            raise RuntimeError("torch_npu printed no tasks: the graph holds no capture")
        events = json.loads(target.read_text())
    found = [event for event in events if event.get("ph") == "X"]
    found.sort(key=lambda event: int(event["args"]["Task Id"]))
    kernels = [event["name"] for event in found if not event["args"]["Task Type"].startswith(CONTROL)]
    return Tasks(tuple(kernels), len(found) - len(kernels))


def largest(found: Sequence[Any]) -> Tasks:
    """The tasks of the graph with most kernels (a compiled step may come with small helper graphs)."""
    return max((tasks(graph) for graph in found), key=lambda entry: len(entry.kernels))


def one_layer(shallow: Sequence[str], deep: Sequence[str], added_layers: int) -> list[str]:
    """The kernels of one decoder layer: what a deeper model has more of, for each layer added.

    In the order of the capture, from a place inside the deep model on (so the list may begin within a layer), where
    every layer is captured alike; else each name with its count.
    """
    more = Counter(deep) - Counter(shallow)
    size, rest = divmod(len(deep) - len(shallow), added_layers)
    for start in range(len(deep) // 2, 0, -1) if not rest else ():
        window = list(deep[start : start + size])
        if Counter({name: count * added_layers for name, count in Counter(window).items()}) == more:
            return window
    return [f"{name} x {count / added_layers:g}" for name, count in sorted(more.items())]
