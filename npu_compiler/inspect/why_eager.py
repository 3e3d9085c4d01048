"""Which steps of a serving run, and which calls of compiled functions, were no replay, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from npu_compiler import reasons
from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.program import Data
from npu_compiler.inspect.run import Modes, Run


class Eager(Data):
    """Steps, or calls, that were no replay, for one reason.

    Attributes:
        where: the report or bundle, and the compiled graph where it is one's calls; of equal ones, the first rank's.
        ranks: those for which just this holds; empty where there is one bundle.
        kind: "decode" and "other" are steps of vLLM, "call" is a call of a compiled function.
        reason: its name. `text`: what happened. `change`: what to change.
        count: how many, of `total` of that kind.
        mode: what steps ran as: NONE (eager) or PIECEWISE.
        smallest, largest, sizes, first, last: see run.StepGroup; 0 and empty for calls.
    """

    where: str
    kind: str
    reason: str
    text: str
    change: str
    count: int
    total: int
    mode: str = "NONE"
    smallest: int = 0
    largest: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    first: int = 0
    last: int = 0
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        kind = "call" if self.kind == "call" else f"{self.kind} step"
        whose = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}: " if self.ranks else ""
        graph = f"{Path(self.where).name}: " if self.kind == "call" else ""
        lines = [f"{whose}{graph}{self.count:,} of {self.total:,} {kind}s: {self.text}"]
        if self.kind != "call":
            most = ", ".join(f"{size} ({count:,}x)" for size, count in self.sizes)
            often = f"; most often {most}" if self.smallest != self.largest else ""
            lines.append(f"  tokens: {_range(self.smallest, self.largest)}{often}")
            lines.append(f"  steps:  {_range(self.first, self.last)}")
        return "\n".join([*lines, f"  change: {self.change}"])


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def why_eager(path: str | Path) -> list[Eager]:
    """What was no replay, the most frequent reason first: serving's steps, then calls of compiled functions. What is
    the same on several ranks is one entry.

    Args:
        path: a run report, a bundle, or a folder with the bundles of a run's ranks.

    Raises:
        BundleError: there is nothing of the kind, or it can't be read.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".json":
        return sorted(_steps(str(place), read_report(place)), key=lambda entry: -entry.count)
    bundles = bundle.all_of(path)
    found: dict[tuple[str, Eager], Eager] = {}
    for one in bundles:
        ranks = (one.header.environment.rank,) if len(bundles) > 1 else ()
        for name, entry in _entries(one):
            key = name, entry.model_copy(update={"where": ""})
            before = found.get(key, entry)
            found[key] = before.model_copy(update={"ranks": (*before.ranks, *ranks)})
    return sorted(found.values(), key=lambda entry: (entry.kind == "call", -entry.count))


def _entries(one: bundle.Bundle) -> Iterator[tuple[str, Eager]]:
    """What was no replay in one process, with the name of the compiled graph where it is one's calls."""
    if one.run is not None:
        yield from (("", entry) for entry in _steps(str(one), one.run))
    for graph in one.graphs:
        yield from ((graph.name, entry) for entry in _calls(f"{one}/{graph.name}", graph))


def summary(path: str | Path) -> str:
    """How many steps and calls there were, as a line each report and graph."""
    place = Path(path)
    if place.is_file() and place.suffix == ".json":
        return _summary(str(place), read_report(place))
    lines = []
    for one in bundle.all_of(path):
        if one.run is not None:
            lines.append(_summary(str(one), one.run))
        lines += [
            f"{one}/{graph.name}: {graph.calls.replays:,} of {_total(graph):,} calls replayed"
            for graph in one.graphs
            if _total(graph)
        ]
    return "\n".join(lines) or f"{path}: no steps, and no calls of captured functions"


def read_report(file: Path) -> Run:
    """A run report.

    Raises:
        BundleError: the file is none.
    """
    try:
        return Run.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise BundleError(
            f"{file} is no run report: {str(error).splitlines()[0]}",
            rule="a run report is the file that additional_config's report_path names",
            fix="check the path",
        ) from error


def _steps(where: str, run: Run) -> Iterator[Eager]:
    for group in run.not_replayed:
        reason = reasons.named(group.reason)
        steps: Modes = run.decode_steps if group.kind == "decode" else run.other_steps
        yield Eager(
            where=where,
            kind=group.kind,
            reason=group.reason,
            text=reason.said(group.detail),
            change=reason.change,
            count=group.steps,
            total=steps.total,
            mode=group.mode,
            smallest=group.smallest,
            largest=group.largest,
            sizes=group.sizes,
            first=group.first,
            last=group.last,
        )


def _calls(where: str, graph: bundle.StoredGraph) -> Iterator[Eager]:
    for text, count in graph.calls.uncaptured.items():
        reason = reasons.of(text)
        yield Eager(
            where=where,
            kind="call",
            reason=reason.name,
            text=text,
            change=reason.change,
            count=count,
            total=_total(graph),
        )


def _total(graph: bundle.StoredGraph) -> int:
    return graph.calls.replays + sum(graph.calls.uncaptured.values())


def _summary(where: str, run: Run) -> str:
    decode, other = run.decode_steps, run.other_steps
    return (
        f"{where}: {decode.replayed:,} of {decode.total:,} decode steps replayed, "
        f"{other.replayed:,} of {other.total:,} other steps"
    )
