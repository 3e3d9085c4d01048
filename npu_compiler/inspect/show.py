"""One compilation as text to read: stage by stage, then the plan, then what was captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.contents import Fire, Plan, Refusal, Stage
from npu_compiler.inspect.over_layers import grouped
from npu_compiler.inspect.streams import summary
from npu_compiler.units import in_bytes


def pipeline(graph: StoredGraph) -> str:
    """What was done to a graph, in order: rewrites, and what was left out and why, with their places."""
    given = ", ".join(f"{name}={graph.about.options[name]}" for name in graph.about.given if name != "dump")
    lines = [f"{graph.name}" + (f" ({given})" if given else "")]
    lines += [f"  incomplete: {graph.incomplete}"] if graph.incomplete else []
    lines += [f"  {line}" for stage in graph.stages for line in _stage(stage)]
    if graph.plan is not None:
        lines += [f"  {line}" for line in _plan(graph.plan)]
    lines += [f"  streams: {entry.key}: {summary(entry)}" for entry in graph.captures if entry.steps]
    lines += [
        f"  captured {entry.key}: {entry.calls} calls, {entry.milliseconds:.1f} ms, {entry.mebibytes:.1f} MiB "
        f"({entry.reason}){'; ' if entry.streams else ''}{entry.streams}"
        for entry in graph.captures
    ]
    return "\n".join(lines)


def overview(bundle: Bundle, graphs: Sequence[StoredGraph]) -> str:
    """Where a bundle was made, what vLLM captured, and the pipelines of these graphs."""
    found = bundle.header.environment
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items() if version != "absent")
    lines = [f"{bundle}: rank {found.rank} of {found.ranks}, {found.device}", f"  {versions}"]
    lines.append(f"  CANN: {found.cann}; {found.platform}")
    lines += [
        f"  vLLM captured {entry.size}: {entry.milliseconds:.1f} ms, {entry.mebibytes:.1f} MiB ({entry.reason})"
        for entry in bundle.captures
    ]
    return "\n".join([*lines, *(pipeline(graph) for graph in graphs)])


def _stage(stage: Stage) -> Iterator[str]:
    calls = f"{stage.calls_of_all} calls"
    if stage.calls != stage.calls_of_all:
        calls += f", shown by {stage.calls}"
    if stage.error:
        yield f"{stage.name}: {stage.error}"
        return
    if stage.ran and not (stage.fired or stage.refused):
        return
    yield f"{stage.name}: {calls}" + (f", {stage.seconds * 1e3:.1f} ms" if stage.ran else "")
    fired: dict[str, list[Fire]] = {}
    for fire in stage.fired:
        fired.setdefault(fire.rule, []).append(fire)
    for rule, fires in fired.items():
        for often, place in grouped((fire.place, fire.layers) for fire in fires):
            yield f"  fired {rule}{often}: {place}"
    refused: dict[tuple[str, str], list[Refusal]] = {}
    for entry in stage.refused:
        refused.setdefault((entry.rule, entry.reason), []).append(entry)
    for (rule, reason), entries in refused.items():
        for often, place in grouped((entry.place, entry.layers) for entry in entries):
            yield f"  left out {rule}{often}: {reason} ({place})"


def _plan(plan: Plan) -> Iterator[str]:
    yield from plan.providers
    if plan.order is not None:
        yield f"order: {plan.order.winner}, {in_bytes(plan.order.peaks[plan.order.winner])} alive at once" + (
            f" at {plan.order.sizes}" if plan.order.sizes else ""
        )
    if plan.memory is not None:
        yield f"memory: {len(plan.memory.blocks)} storages, {in_bytes(plan.memory.peak)} in one block"
    if plan.once:
        yield f"constants: {len(plan.once)} computed once, {in_bytes(plan.once_bytes)}"
    if plan.cache:
        yield f"program {plan.cache}"
        yield from (f"  it differs from the nearest stored one: {line}" for line in plan.cache_missed)
    yield f"compiled in {plan.seconds:.2f} s, this dump included"
