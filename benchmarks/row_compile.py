"""Compilation, cold and warm: CPU seconds from `torch.compile` to the end of the first call, in fresh processes.

The model is that of `python -m benchmarks compiler`, which has more of them, deeper ones, and the seconds by stage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

from benchmarks import compiler, models
from benchmarks.harness import Contestant, Factory, Goal, Missing, Row

MODEL, LAYERS = "qwen3", models.DEPTHS[0]
SUBJECT, DYNAMO = "ascend", "dynamo alone"
BACKENDS = {SUBJECT: "ascend", "aot_eager": "aot_eager", "npugraph_ex": "npugraph_ex", "npugraphs": "npugraphs"}
BACKENDS |= {"cpu inductor": "inductor", DYNAMO: "eager"}
OF_AOT_EAGER = 0.77
"""`aot_eager`'s time over ours, at least: 1 / 1.3."""


def started(cache: str, backend: str) -> float:
    """CPU seconds of a fresh process with the compiler caches in `cache`.

    Raises:
        Missing: the process failed; its last error is in the message.
    """
    found = compiler.apart(cache, "seconds", backend, MODEL, LAYERS)
    if found["missing"]:
        raise Missing(found["missing"])
    return float(found["cpu"])


def cold(name: str) -> Factory:
    """Every start finds empty caches. The first one, not counted, shows whether there can be any."""

    def start() -> float:
        with tempfile.TemporaryDirectory() as cache:
            return started(cache, BACKENDS[name])

    def factory() -> Contestant:
        start()
        return Contestant(name, lambda count: sum(start() for _ in range(count)))

    return factory


def warm(name: str) -> Factory:
    """Every start finds what one before it kept, where the backend keeps anything."""

    def factory() -> Contestant:
        folder = tempfile.TemporaryDirectory()
        started(folder.name, BACKENDS[name])

        def starts(count: int) -> float:
            return sum(started(folder.name, BACKENDS[name]) for _ in range(count))

        return Contestant(name, starts, kept=(folder,))

    return factory


def row(kind: str, start: Callable[[str], Factory], names: Sequence[str]) -> Row:
    return Row(
        name=f"compile_{kind}",
        title=f"compilation of Qwen3, {LAYERS} layers, {kind}: CPU seconds to the end of the first call",
        unit="s",
        contestants={name: start(name) for name in names},
        reference=DYNAMO,
        kin=(DYNAMO,),
        goals=(Goal(peer="aot_eager", faster_than=OF_AOT_EAGER),),
        long=True,
        starts=True,
    )


def rows() -> list[Row]:
    return [row("cold", cold, [*BACKENDS]), row("warm", warm, [SUBJECT, "aot_eager", "cpu inductor", DYNAMO])]
