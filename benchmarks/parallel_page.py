"""docs/parallel_figures.md, and the same tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import kept

Record = Mapping[str, Any]
TITLES = {"dense": "Dense layers", "experts": "Layers of experts", "nz": "Weights in FRACTAL_NZ"}
HEAD = """# Figures of several ranks

Written by `python -m benchmarks parallel` (`make bench-parallel`); parts of it by `--parts`, `--resume` goes on.

Two ranks, processes on the host runtime, each on one core of its own; nothing here ran on Ascend cards, and a time here
says nothing about a card's. Collectives and bytes of a layer are exact: what a program with 4 layers has more than one
with 2, halved. Bytes are those that a rank sends, by the ring algorithm (all-to-all: directly). Times are of a captured
call of 4 layers (hidden size 512, bfloat16): medians over rounds in which the variants take turns, and the ratio to the
first one within a round, with the smallest and the largest.
"""


def page(parts: Mapping[str, Record]) -> str:
    """The page in Markdown, of the parts there are."""
    lines = [HEAD]
    for part, title in TITLES.items():
        lines += [f"## {title}", ""]
        found = parts.get(part)
        if found is None:
            lines += ["Not measured yet.", ""]
            continue
        about = found["about"]
        loaded = "; other programs worked beside it, so times are rough" if kept.loaded(dict(found)) else ""
        lines += [
            *table(part, found["records"]),
            "",
            f"Measured {about['time']}, compiler {about['compiler'][:12]}{loaded}.",
            "",
        ]
    lines += ["Token drop has [figures of its own](token_drop.md).", ""]
    return "\n".join(lines)


def table(part: str, records: Sequence[Record]) -> list[str]:
    """The lines of a part's table."""
    return list(_products(records) if part == "nz" else _layers(records))


def _layers(records: Sequence[Record]) -> Iterator[str]:
    yield "| rows | variant | collectives a layer | KiB sent a layer | microseconds | time against the first |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in records:
        counts = ", ".join(f"{count:g} {_short(name)}" for name, count in one["collectives"].items() if count)
        yield (
            f"| {one['rows']} | {one['variant']} | {counts or 'none'} | {one['bytes'] / 1024:.4g} "
            f"| {one['microseconds']:.0f} | {_ratio(one)} |"
        )


def _products(records: Sequence[Record]) -> Iterator[str]:
    yield "| dtype | rows x inner x columns | ND, microseconds | NZ, microseconds | NZ against ND |"
    yield "| --- | --- | --- | --- | --- |"
    for one in records:
        shape = " x ".join(map(str, one["shape"]))
        nd, fractals = (f"{one[f'{kind}_microseconds']:.0f}" for kind in ("nd", "nz"))
        yield f"| {one['dtype']} | {shape} | {nd} | {fractals} | {_ratio(one)} |"


def _ratio(one: Record) -> str:
    return f"{one['ratio']:.2f} ({one['ratio_min']:.2f} .. {one['ratio_max']:.2f})"


def _short(name: str) -> str:
    """`npu_fused.all_gather_rows.default` as `all_gather_rows`."""
    return name.split(".")[1].rstrip("_")
