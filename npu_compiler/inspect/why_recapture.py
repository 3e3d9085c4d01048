"""Which sizes were captured more than once, and which functions compiled more than once: what changed each time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from npu_compiler import reasons
from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.program import Data


class Recapture(Data):
    """Captures beyond the first of a size, or compilations beyond the first of a function, for one reason.

    Attributes:
        where: the bundle, and the compiled graph.
        reason: its name. `change`: what to change.
        keys: the sizes that were captured again, each as often as it was.
        changed: what changed, a text each time; empty where the reason says all.
        milliseconds: what they took together.
    """

    where: str
    reason: str
    text: str
    change: str
    keys: tuple[str, ...]
    changed: tuple[str, ...]
    milliseconds: float

    def __str__(self) -> str:
        times = "once" if len(self.keys) == 1 else f"{len(self.keys)} times"
        lines = [f"{self.where}: {self.text}, {times}, {self.milliseconds:.1f} ms"]
        lines += [f"  {key}: {text}" if text else f"  {key}" for key, text in zip(self.keys, self.changed, strict=True)]
        return "\n".join([*lines, f"  change: {self.change}"])


def why_recapture(path: str | Path) -> list[Recapture]:
    """What was captured or compiled again, by reason, what took longest first.

    Args:
        path: a bundle, or a folder with the bundles of a run's ranks.

    Raises:
        BundleError: there is none, or it can't be read.
    """
    if Path(path).is_file() and Path(path).suffix == ".json":
        raise BundleError(
            f"{path} is no bundle: what was captured again, and what had changed, is in none of a run's reports",
            rule="this command reads the bundle of the run; `why-eager` reads its report too",
            fix="name the folder that debug_dump_path (vLLM) or the option `dump` named",
        )
    found: list[Recapture] = []
    for one in bundle.all_of(path):
        captures = ((entry.size, entry.reason, entry.milliseconds) for entry in one.captures)
        found += _grouped(str(one), captures)
        for graph in one.graphs:
            inner = [(entry.key, entry.reason, entry.milliseconds) for entry in graph.captures]
            if graph.calls.recompiled:
                seconds = graph.plan.seconds if graph.plan is not None else 0.0
                why = reasons.RECOMPILED.said(graph.calls.recompiled)
                inner.append((graph.name, why, seconds * 1e3))
            found += _grouped(f"{one}/{graph.name}", inner)
    return sorted(found, key=lambda entry: -entry.milliseconds)


def _grouped(where: str, captures: Iterator[tuple[str, str, float]] | list[tuple[str, str, float]]) -> list[Recapture]:
    groups: dict[reasons.Reason, list[tuple[str, str, float]]] = defaultdict(list)
    for key, text, milliseconds in captures:
        reason = reasons.of(text)
        if reason not in reasons.NEW_CAPTURES:
            groups[reason].append((key, text.removeprefix(reason.text).removeprefix(": "), milliseconds))
    return [
        Recapture(
            where=where,
            reason=reason.name,
            text=reason.text,
            change=reason.change,
            keys=tuple(key for key, _, _ in entries),
            changed=tuple(text for _, text, _ in entries),
            milliseconds=sum(milliseconds for _, _, milliseconds in entries),
        )
        for reason, entries in groups.items()
    ]
