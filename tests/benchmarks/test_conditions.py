"""What is said of a row that was disturbed from its beginning to its end; on rows made up for it."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import check, conditions, cpu, rows_page, stored
from tests.benchmarks import test_rows_page


def row(others: float = 0.01, probe_us: float = 70.0, processor: str = "one", torch: str = "2") -> stored.Row:
    about = test_rows_page.ABOUT | {"machine": {"processor": processor}, "versions": {"torch": torch}}
    return {"about": about, "records": [test_rows_page.record("ours", conditions=seen(others, probe_us))]}


def seen(others: float, probe_us: float) -> dict[str, float]:
    return conditions.noted(cpu.Use(seconds=1.0, all=others * CORES, own=0.0), probe_us / 1e6)


CORES = os.cpu_count() or 1


def test_shares_of_the_cores() -> None:
    before, after = cpu.Use(10.0, 100.0, 50.0), cpu.Use(12.0, 103.0, 52.0)
    assert after.since(before) == cpu.Use(2.0, 3.0, 2.0)
    assert after.since(before).others == pytest.approx(1.0 / 2.0 / CORES)
    both = cpu.Use.sum([cpu.Use(2.0, 3.0, 2.0), cpu.Use(1.0, 0.5, 0.5)])
    assert both == cpu.Use(3.0, 3.5, 2.5)
    assert cpu.Use(1.0, 0.99, 1.0).others == 0.0  # ticks


def test_a_quiet_row_and_one_beside_other_programs() -> None:
    quiet, loaded = row(others=0.02), row(others=0.34)
    assert conditions.disturbances(quiet, [quiet, loaded]) == []
    assert conditions.disturbances(loaded, [quiet, loaded]) == ["other programs had 34% of the cores"]


def test_a_slower_probe_than_another_row_had() -> None:
    best, near, slow = row(probe_us=70.0), row(probe_us=90.0), row(probe_us=105.0)
    rows = [slow, near, best]
    assert conditions.disturbances(best, rows) == conditions.disturbances(near, rows) == []
    assert conditions.disturbances(slow, rows) == ["the probe took 1.50 times what it took in another row"]
    assert conditions.disturbances(slow, []) == []  # nothing to compare with


@pytest.mark.parametrize("other", [{"processor": "another"}, {"torch": "3"}])
def test_probes_of_other_machines_and_releases_are_not_compared(other: dict[str, str]) -> None:
    slow = row(probe_us=105.0)
    assert conditions.disturbances(slow, [row(probe_us=70.0, **other), slow]) == []


def test_rows_without_conditions() -> None:
    old = row()
    del old["records"][0]["conditions"]  # as rows of before are stored
    untimed = row()
    untimed["records"][0]["conditions"] = None
    slow = row(probe_us=105.0)
    for none in (old, untimed):
        assert conditions.disturbances(none, [none, slow]) == conditions.disturbances(slow, [none, slow]) == []


def test_the_table_says_it() -> None:
    loaded = row(others=0.34)
    records: list[dict[str, Any]] = loaded["records"]
    records[0] |= {"min": 240.0, "max": 260.0}
    text = command.table("a title", records, conditions.disturbances(loaded, [loaded]))
    assert "others had 34% of the cores]" in text
    assert "DISTURBED ALL THE WHILE: other programs had 34% of the cores; measure again" in text
    assert "ALL THE WHILE" not in command.table("a title", records)


def test_the_page_says_it() -> None:
    rows = {"quiet": row(), "loaded": row(others=0.34), "slow": row(probe_us=105.0)}
    text = rows_page.page(rows, {})
    assert "disturbed ones counted | 1% | 1.00 | one |" in text
    assert "disturbed ones counted | 34%, disturbed | 1.00 | one |" in text
    assert "disturbed ones counted | 1% | 1.50, disturbed | one |" in text


def test_the_check_of_floors_says_it(tmp_path: Path) -> None:
    quiet, slow = row(), row(probe_us=105.0)
    for made in (quiet, slow):
        made["records"][0]["noisy"] = False
    stored.write(tmp_path, "quiet", quiet)
    stored.write(tmp_path, "slow", slow)
    wrong, notes = check.check(tomllib.loads("[quiet]\nat_most = 300\n[slow]\nat_most = 300"), tmp_path)
    assert wrong == [] and [note.split(":")[0] for note in notes] == ["slow"]
