"""docs/benchmark_figures.md, from the stored rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import number

Record = Mapping[str, Any]
HEAD = """# Figures of the benchmarks

Written by `make bench` from the rows it stores; `python -m benchmarks --page` writes it after rows that were measured
one by one. What each row and contestant is, and how it is measured, is in [benchmarks.md](benchmarks.md). Nothing here
ran on an Ascend card: `npu` is the host runtime. A time is the median of the rounds; behind it stands the time as a
multiple of that of the row's first line, the median of the ratios inside a round, with their range. Rows are of the
runs named in the last table; times of different rows are not compared.
"""


def page(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown; `stored` are the rows by name, as in their JSON files."""
    missed = [line for name, row in stored.items() for line in _missed(name, row["records"])]
    lines = [HEAD, "## Targets that are missed", ""]
    lines += missed or ["None."]
    lines += [
        "",
        "## Rows",
        "",
        "| row | contestant | median | time / the first's (range) | targets |",
        "|---" * 5 + "|",
    ]
    lines += [line for name, row in stored.items() for line in _lines(name, row["records"])]
    lines += ["", "## Conditions", "", "| row | measured | rounds | processor |", "|---" * 4 + "|"]
    lines += [_conditions(name, row) for name, row in stored.items()]
    return "\n".join(lines) + "\n"


def _missed(name: str, records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["met"] is False:
            yield f"- `{name}`, {record['peer']}: {record['goal']}; reached {_reached(record)}"


def _reached(record: Record) -> str:
    """What a target is compared with, as far as the record has it."""
    if record["peer"] != record["subject"]:
        return f"{record['ratio']:.3f}x"
    parts = [f"{number(record['median'])} {record['unit']}"]
    if record["best_ratio"] is not None:
        parts.append(f"{record['best_ratio']:.3f}x of {record['best_rival']}")
    if "floor" in record["goal"]:
        parts.append(f"{record['floor'] / record['median']:.0%} of the floor")
    if record["rest"] is not None:
        parts.append(f"{number(record['rest'])} {record['unit']} beside its part")
    return ", ".join(parts)


def _lines(name: str, records: Sequence[Record]) -> Iterator[str]:
    label = f"`{name}`"
    for record in records:
        if record["missing"]:
            yield f"| {label} | {record['peer']} | missing |  | {record['missing']} |"
        else:
            time = f"{number(record['median'])} {record['unit']}"
            yield f"| {label} | {record['peer']} | {time} | {_ratio(record)} | {_target(record)} |"
        label = ""


def _ratio(record: Record) -> str:
    if record["ratio"] is None or record["peer"] == record["subject"]:
        return "1" if record["ratio"] is not None else ""
    return f"{number(record['ratio'])} ({number(record['ratio_min'])} .. {number(record['ratio_max'])})"


def _target(record: Record) -> str:
    parts = [f"{record['goal']}: {'met' if record['met'] else 'missed'}"] if record["goal"] else []
    if record["rest"] is not None:
        parts.append(f"{number(max(0.0, record['rest']))} {record['unit']} beside its part")
    if record["goal"] and "floor" in record["goal"]:
        parts.append(f"{record['floor'] / record['median']:.0%} of the floor")
    return "; ".join(parts)


def _conditions(name: str, row: Mapping[str, Any]) -> str:
    about, first = row["about"], row["records"][0]
    rounds = f"{max(record['rounds'] for record in row['records'])}, {first['rejected']} disturbed"
    rounds += ", disturbed ones counted" * first["noisy"] + ", --quick" * about["quick"]
    return f"| `{name}` | {about['time']} | {rounds} | {about['machine']['processor']} |"
