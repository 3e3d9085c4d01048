"""`python -m benchmarks check`: compares stored rows with `benchmarks/floors.toml`, fails where one is below.

A table of the file is a row. Its keys:

    at_most = 100.0       the subject's own time, in the row's unit
    rest = 1500.0         what the subject takes beside the row's part, at most, in the row's unit
    best = 1.2            time of the best rival / time of the subject, at least
    of_roof = 0.85        the time at the row's roof (what the hardware allows) / time of the subject, at least
    "npu eager" = 8.0     time of that contestant / time of the subject, at least

Nothing is measured here: `make bench` does. A row that was not measured and a contestant that is missing fail too; a
row that was disturbed is noted.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import conditions, stored

FLOORS = Path(__file__).parent / "floors.toml"
MOST = ("at_most", "rest")
Floors = Mapping[str, Mapping[str, float]]


def figure(key: str, found: Mapping[str, dict[str, Any]]) -> float | None:
    """What a key of a row is compared with; `found` are its records by contestant, the subject first."""
    subject = next(iter(found.values()))
    if key == "at_most":
        return subject["median"]
    if key == "rest":
        return subject.get("rest")
    if key == "best":
        return subject["best_ratio"]
    if key == "of_roof":
        return subject["roof"] / subject["median"] if subject["roof"] and subject["median"] else None
    return found[key]["ratio"] if key in found else None


def broken(row: str, limits: Mapping[str, float], kept: stored.Row | None) -> list[str]:
    """A sentence for each floor of `row` that its stored records don't hold."""
    if kept is None:
        command = "instructions" if row.startswith("instructions_") else f"--rows {row}"
        return [f"{row}: not measured; run `make bench` or `.venv/bin/python -m benchmarks {command}`"]
    found = {record["peer"]: record for record in kept["records"]}
    sentences = []
    for key, limit in limits.items():
        value = figure(key, found)
        if value is None:
            reason = found[key]["missing"] if key in found else f"the row has {', '.join(found)}"
            sentences.append(f"{row}: no figure for {key!r} ({reason})")
        elif key in MOST:
            if value > limit:
                what = f"{value:.4g} {next(iter(found.values()))['unit']}" + " beside its part" * (key == "rest")
                sentences.append(f"{row}: {what}, allowed are {limit:g}")
        elif value < limit:
            sentences.append(f"{row}: {key} is {value:.3g}, its floor is {limit:g}")
    return sentences


def check(floors: Floors, results: Path) -> tuple[list[str], list[str]]:
    """The floors that don't hold, and notes on rows whose figures are rough, in the order of `floors`."""
    wrong, notes = [], []
    rows = {row: stored.read(results, row) for row in floors}
    there = [kept for kept in rows.values() if kept]
    for row, limits in floors.items():
        kept = rows[row]
        wrong += broken(row, limits, kept)
        if kept and (kept["about"]["quick"] or kept["records"][0]["noisy"] or conditions.disturbances(kept, there)):
            notes.append(f"{row}: measured with --quick or on a busy machine; measure again before you believe it")
    return wrong, notes


def main(arguments: Sequence[str]) -> int:
    """0 when every floor holds, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--floors", type=Path, default=FLOORS, help="TOML file of floors (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=stored.RESULTS, help="folder of the JSON files (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    floors = tomllib.loads(options.floors.read_text())
    if not any((options.results / f"{row}.json").exists() for row in floors):
        print(f"nothing is measured yet in {options.results}; run `make bench`,")
        print("or `.venv/bin/python -m benchmarks --rows ROW` for some rows")
        return 1
    wrong, notes = check(floors, options.results)
    for note in notes:
        print(f"note: {note}")
    for sentence in wrong:
        print(f"FAILED {sentence}")
    print(f"{sum(map(len, floors.values()))} floors of {len(floors)} rows, {len(wrong)} not held")
    return 1 if wrong else 0
