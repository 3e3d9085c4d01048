"""docs/parallel_figures.md, and the same tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import kept, row_streams
from benchmarks.parallel_drop import ALLGATHER, ALLTOALL

Record = Mapping[str, Any]
HEAD = """# Figures of several ranks

Written by `make bench-parallel` (`python -m benchmarks parallel`), with the conditions of each part below it.

Two ranks are processes on the host runtime, each on one core of its own, that talk over shared memory; nothing here ran
on Ascend cards, and a time here says nothing about a card's. A time is that of the slower rank: the median of rounds in
which the variants take turns ([protocol](benchmarks.md#protocol)). A ratio is made within a round; the smallest and the
largest are in brackets.
"""
ABOUT = {
    "dense": """## Dense layers

4 tensor-parallel layers of hidden size 512, bfloat16, captured; a step ends with a wait. Collectives and bytes of a
layer are exact: what a program with 4 layers has more than one with 2, halved. Bytes are those that a rank sends, by
the ring algorithm (all-to-all: directly). Outputs are compared.""",
    "experts": """## Layers of experts

The same in float32 with 8 experts of inner size 1024, of which a token has 2, whole ones on each rank but for the last
line; the router decides. How the methods work is in [moe.md](moe.md).""",
    "drop": """## Token drop and skewed routing

One layer of 8 experts for 512 tokens of 2 (hidden size 512, inner 1024, float32), captured: exact with ALLGATHER and
with ALLTOALL, and with tokens dropped ([token_drop.md](token_drop.md)). Imbalance: rows of the fuller rank, as a
multiple of an even share. Error: of the layer's result, against the exact one, as norms. Gain: how much more time the
exact one takes in the same round.""",
    "nz": """## Weights in FRACTAL_NZ

A captured product with the option `weight_nz` "all" (NZ) and "off" (ND), one core, with a wait behind each; PyTorch's
own on the CPU beside it. Above 1, NZ is faster.""",
    "streams": """## Several streams

The row `two_streams` of [benchmarks.md](benchmarks.md), on one rank with both cores: `multistream="auto"` against one
stream. From a [timeline](trace.md) of 20 steps, microseconds a step: from the first task to the last one, with work on
each stream, and with work on both at once.""",
}


def page(parts: Mapping[str, Record]) -> str:
    """The page in Markdown; `parts` that are not there are named as missing."""
    lines = [HEAD]
    for part, text in ABOUT.items():
        lines += [text, ""]
        found = parts.get(part)
        lines += [*table(part, found["records"]), "", conditions(found)] if found else ["Not measured yet."]
        lines.append("")
    return "\n".join(lines)


def conditions(found: Record) -> str:
    """When a part was measured, and how undisturbed."""
    about, records = found["about"], found["records"]
    noisy = any(record["noisy"] for record in records)
    how = "".join((", --quick" * about["quick"], ", disturbed rounds counted" * noisy))
    return (
        f"Measured {about['time']} in {about['seconds']:.0f} s{how}, compiler {about['compiler'][:12]}; at least "
        f"{min(record['rounds'] for record in records)} rounds; other programs took {about['others']:.0%} of the "
        f"machine{': times are rough' * kept.loaded(dict(found))}."
    )


def table(part: str, records: Sequence[Record]) -> list[str]:
    """The lines of a part's table."""
    makers = {"dense": _layers, "experts": _layers, "drop": _drops, "nz": _products, "streams": _streams}
    return list(makers[part](records))


def _layers(records: Sequence[Record]) -> Iterator[str]:
    yield "| rows | variant | collectives a layer | KiB sent a layer | microseconds | time against the first |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in records:
        counts = ", ".join(f"{count:g} {name}" for name, count in one["collectives"].items() if count)
        yield (
            f"| {one['rows']} | {one['peer']} | {counts or 'none'} | {one['bytes'] / 1024:.4g} "
            f"| {one['median']:.0f} | {_ratio(one)} |"
        )


def _drops(records: Sequence[Record]) -> Iterator[str]:
    yield "| imbalance | variant | dropped | error | milliseconds | gain over ALLGATHER | gain over ALLTOALL |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for one in records:
        gains = (one[f"over_{other}"] for other in (ALLGATHER, ALLTOALL))
        yield (
            f"| {one['imbalance']:g} | {one['peer']} | {one['dropped']:.1%} | {one['error']:.1%} "
            f"| {one['milliseconds']:.2f} | {' | '.join(map(_gain, gains))} |"
        )


def _products(records: Sequence[Record]) -> Iterator[str]:
    yield "| rows x inner x columns | NZ, microseconds | ND | CPU | ND / NZ | CPU / NZ |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for title, (nz, nd, cpu) in _rows(records, ("NZ", "ND", "cpu eager")):
        times = " | ".join(f"{one['median']:.0f}" for one in (nz, nd, cpu))
        yield f"| {title} | {times} | {_ratio(nd)} | {_ratio(cpu)} |"


def _streams(records: Sequence[Record]) -> Iterator[str]:
    yield "| way | microseconds | time / that of two streams | a step, by the timeline | busy, each stream | at once |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for _, ways in _rows(records, tuple(row_streams.WAYS)):
        for one in ways:
            said = one["timeline"]
            busy = ", ".join(f"{stream:.0f}" for stream in said["busy"])
            yield (
                f"| {one['peer']} | {one['median']:.0f} | {_ratio(one)} | {said['microseconds']:.0f} | {busy} "
                f"| {said['together']:.0f} |"
            )


def _rows(records: Sequence[Record], peers: Sequence[str]) -> Iterator[tuple[str, list[Record]]]:
    """The records of these peers, row by row, in their order.

    Raises:
        RuntimeError: one could not be measured; its reason.
    """
    for title in dict.fromkeys(record["title"] for record in records):
        found = {record["peer"]: record for record in records if record["title"] == title}
        for peer in peers:
            if found[peer]["missing"]:
                raise RuntimeError(f"{title}: {peer} is missing: {found[peer]['missing']}")
        yield title, [found[peer] for peer in peers]


def _ratio(one: Record) -> str:
    return f"{one['ratio']:.2f} ({one['ratio_min']:.2f} .. {one['ratio_max']:.2f})"


def _gain(one: Record) -> str:
    return f"{one['median'] - 1:+.0%} ({one['min'] - 1:+.0%} .. {one['max'] - 1:+.0%})"
