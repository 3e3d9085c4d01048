"""docs/benchmark_figures.md, from the stored rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import conditions, cpu
from benchmarks.harness import number
from benchmarks.stored import PACKAGES

Record = Mapping[str, Any]
Row = conditions.Row
HEAD = """# Figures of the benchmarks

Written by `make bench` from the rows it stores; `.venv/bin/python -m benchmarks --page` writes it after rows that were
measured one by one. What each row and contestant is, and how it is measured, is in [benchmarks.md](benchmarks.md).
Nothing here ran on an Ascend card: `npu` is the host runtime. A time is the median of the rounds; behind it stands the
time as a multiple of that of the row's first line, the median of the ratios inside a round, with their range. Rows are
of the runs named in the last table; times of different rows are not compared.
"""
SLOWER = """Peers whose time is below that of the row's first contestant, in the median of the rounds; where the range
goes above 1, some rounds say otherwise. What does a part of the work, or is the first contestant in another way or
format, is no peer."""
CONDITIONS = f"""`others`: the share of the machine's cores that other programs had in the rounds that count.
`probe`: what the fixed matrix product beside them took, as a multiple of the least of these rows on the same processor
and torch. Above {cpu.LOADED:.0%} and {conditions.PROBE_TOLERANCE:g} the row was disturbed. A `-`: nothing was timed, or
it was not noted yet."""


def page(stored: Mapping[str, Mapping[str, Any]], peers: Mapping[str, Sequence[str]]) -> str:
    """The page in Markdown; `stored` are the rows by name, as they are read, `peers` those that a row may be slower
    than."""
    sections = {
        "Targets that are missed": ("", _missed),
        "Slower than a peer": (SLOWER, lambda name, records: _slower(name, records, peers.get(name, ()))),
    }
    lines = [HEAD]
    for title, (text, of_row) in sections.items():
        found = [line for name, row in stored.items() for line in of_row(name, row["records"])]
        lines += [f"## {title}", "", *([text, ""] if text else []), *(found or ["None."]), ""]
    lines += ["## Rows", "", "| row | contestant | median | time / the first's (range) | targets |", "|---" * 5 + "|"]
    lines += [line for name, row in stored.items() for line in _lines(name, row["records"])]
    lines += ["", "## Versions", "", "| package | version | rows |", "|---" * 3 + "|", *_versions(stored)]
    columns = ("row", "measured", "rounds", "others", "probe", "processor")
    lines += ["", "## Conditions", "", CONDITIONS, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_conditions(name, row, stored.values()) for name, row in stored.items()]
    return "\n".join(lines) + "\n"


def _missed(name: str, records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["met"] is False:
            yield f"- `{name}`, {record['peer']}: {record['goal']}; reached {_reached(record)}"


def _slower(name: str, records: Sequence[Record], peers: Sequence[str]) -> Iterator[str]:
    first = records[0]
    for record in records:
        if record["peer"] in peers and record["ratio"] is not None and record["ratio"] < 1:
            yield (
                f"- `{name}`: {first['peer']} {number(first['median'])} {first['unit']}, "
                f"{record['peer']} {number(record['median'])} {record['unit']}; {record['ratio']:.3f}x "
                f"({number(record['ratio_min'])} .. {number(record['ratio_max'])})"
            )


def _versions(stored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each version of a package, the one of most rows first. Rows of before note only what they loaded."""
    for package in PACKAGES:
        rows: dict[str, list[str]] = {}
        for name, row in stored.items():
            rows.setdefault(row["about"].get("versions", {}).get(package, "not noted"), []).append(f"`{name}`")
        most = max(rows, key=lambda version: len(rows[version]))
        yield f"| {package} | {most} | {'all' if len(rows) == 1 else 'all others'} |"
        for version in rows.keys() - {most}:
            yield f"| {package} | {version} | {', '.join(rows[version])} |"


def _reached(record: Record) -> str:
    """What a target is compared with, as far as the record has it."""
    if record["peer"] != record["subject"]:
        return f"{record['ratio']:.3f}x"
    parts = [f"{number(record['median'])} {record['unit']}"]
    if record["best_ratio"] is not None:
        parts.append(f"{record['best_ratio']:.3f}x of {record['best_rival']}")
    parts += _share_of_roof(record)
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
    if record["peer"] == record["subject"]:
        parts += _share_of_roof(record)
    return "; ".join(parts)


def _share_of_roof(record: Record) -> list[str]:
    return [f"{record['roof'] / record['median']:.0%} of the roof"] if record["roof"] else []


def _conditions(name: str, row: Row, rows: Iterable[Row]) -> str:
    about, first = row["about"], row["records"][0]
    rounds = f"{max(record['rounds'] for record in row['records'])}, {first['rejected']} disturbed"
    rounds += ", disturbed ones counted" * first["noisy"] + ", --quick" * about["quick"]
    others = probe = "-"
    if (seen := conditions.of(row)) is not None and (ratio := conditions.probe_ratio(row, rows)) is not None:
        others = f"{seen['others']:.0%}" + ", disturbed" * (seen["others"] > cpu.LOADED)
        probe = f"{ratio:.2f}" + ", disturbed" * (ratio > conditions.PROBE_TOLERANCE)
    return f"| `{name}` | {about['time']} | {rounds} | {others} | {probe} | {about['machine']['processor']} |"
