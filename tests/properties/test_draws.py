"""What is drawn depends on the seed alone, not on the modules that other tests have loaded."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.properties.draws import integers, one_of


def drawn(number: st.SearchStrategy[int]) -> list[list[int]]:
    found = []

    @seed(7)
    @settings(max_examples=100, database=None, phases=[Phase.generate])
    @given(st.lists(number, min_size=5, max_size=9))
    def run(items: list[int]) -> None:
        found.append(items)

    run()
    return found


def test_a_module_loaded_between_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, of_hypothesis = integers(-3, 9_000), st.integers(-3, 9_000)
    before = drawn(ours), drawn(of_hypothesis)
    (tmp_path / "of_another.py").write_text("\n".join(f"C{n} = {n}" for n in range(8_101, 8_200)))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_another")
    assert drawn(ours) == before[0]
    assert drawn(of_hypothesis) != before[1], "hypothesis no longer draws constants: draws.py can go"


def test_bounds_are_reached_and_kept() -> None:
    found = {item for items in drawn(integers(-1, 3)) for item in items}
    assert found == {-1, 0, 1, 2, 3}
    assert {item for items in drawn(one_of([5, 7])) for item in items} == {5, 7}
    assert {item for items in drawn(integers(4, 4)) for item in items} == {4}
