"""Stored rows against their floors, on rows made up for it; and the plot of such rows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import check, instructions, plot, stored


def row(subject: float = 10.0, peers: dict[str, float] | None = None, **about: Any) -> dict[str, Any]:
    """A stored row: time of the subject "own", and ratios of its peers."""
    empty: dict[str, Any] = {"subject": "own", "unit": "us", "roof": 8.0, "rest": 4.0, "missing": None, "noisy": False}
    own = empty | {"peer": "own", "median": subject, "ratio": 1.0, "best_ratio": 1.5, "best_rival": "onnx"}
    others = [
        empty | {"peer": name, "median": subject * ratio, "ratio": ratio} for name, ratio in (peers or {}).items()
    ]
    records = [own, *others]
    for record in records:
        record.update(ratio_min=record["ratio"] * 0.9, ratio_max=record["ratio"] * 1.1)
    return {"about": {"title": "made up", "quick": False} | about, "records": records}


def checked(folder: Path, floors: str, kept: dict[str, Any] | None) -> tuple[int, list[str], list[str]]:
    """Exit code of the command, sentences, notes."""
    if kept is not None:
        (folder / "made_up.json").write_text(json.dumps(kept))
    file = folder / "floors.toml"
    file.write_text(f"[made_up]\n{floors}\n")
    wrong, notes = check.check(tomllib.loads(floors and file.read_text()), folder)
    return command.main(["check", "--floors", str(file), "--results", str(folder)]), wrong, notes


@pytest.mark.parametrize(
    ("holds", "breaks", "sentence"),
    [
        ("at_most = 10.5", "at_most = 9.5", "made_up: 10 us, allowed are 9.5"),
        ("rest = 4.5", "rest = 3.5", "made_up: 4 us beside its part, allowed are 3.5"),
        ("best = 1.5", "best = 1.6", "made_up: best is 1.5, its floor is 1.6"),
        ("of_roof = 0.8", "of_roof = 0.81", "made_up: of_roof is 0.8, its floor is 0.81"),
        ('"a peer" = 2.0', '"a peer" = 2.5', "made_up: a peer is 2, its floor is 2.5"),
    ],
)
def test_a_floor_holds_or_is_named_with_its_figure(tmp_path: Path, holds: str, breaks: str, sentence: str) -> None:
    made = row(peers={"a peer": 2.0})
    assert checked(tmp_path, holds, made) == (0, [], [])
    assert checked(tmp_path, breaks, made) == (1, [sentence], [])


def test_what_was_not_measured_fails(tmp_path: Path) -> None:
    code, wrong, _ = checked(tmp_path, "best = 1.0", None)
    assert code == 1 and "made_up: not measured; run `make bench`" in wrong[0]


def test_a_missing_or_unknown_contestant_fails_with_the_reason(tmp_path: Path) -> None:
    made = row(peers={"a peer": 2.0})
    made["records"][1].update(ratio=None, missing="no such library")
    assert checked(tmp_path, '"a peer" = 1.0', made)[1] == ["made_up: no figure for 'a peer' (no such library)"]
    assert checked(tmp_path, "another = 1.0", made)[1] == ["made_up: no figure for 'another' (the row has own, a peer)"]


def test_rough_figures_are_said(tmp_path: Path) -> None:
    assert "measure again" in checked(tmp_path, "best = 1.0", row(quick=True))[2][0]
    noisy = row()
    noisy["records"][0]["noisy"] = True
    assert "measure again" in checked(tmp_path, "best = 1.0", noisy)[2][0]


def test_rows_of_before_the_word_was_roof_are_read(tmp_path: Path) -> None:
    old = row()
    for record in old["records"]:
        record["floor"] = record.pop("roof")
        record["goal"] = "85% of the floor"
    assert checked(tmp_path, "of_roof = 0.8", old) == (0, [], [])
    read = stored.read(tmp_path, "made_up")
    assert read is not None and read["records"][0]["goal"] == "85% of the roof"


def test_a_row_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert stored.read(tmp_path, "made_up") is None
    stored.write(tmp_path, "made_up", row())
    assert stored.read(tmp_path, "made_up") == row()


def test_what_to_run_for_a_row_that_was_not_measured() -> None:
    for name in instructions.ROWS:
        assert "-m benchmarks instructions`" in check.broken(name, {"at_most": 1.0}, None)[0]
    assert "-m benchmarks --rows graph_launch`" in check.broken("graph_launch", {"at_most": 1.0}, None)[0]


def test_a_row_is_stored_with_the_versions_of_what_it_compares() -> None:
    noted = stored.about("a title", quick=False)["versions"]
    assert noted.keys() == set(stored.PACKAGES)
    assert noted["torch"] == torch.__version__ and noted["vllm"] == importlib.metadata.version("vllm")


def test_committed_floors_name_rows_and_contestants_that_exist() -> None:
    rows = command.all_rows()
    assert rows.keys() | instructions.ROWS.keys() == tomllib.loads(check.FLOORS.read_text()).keys()
    for name, limits in tomllib.loads(check.FLOORS.read_text()).items():
        if name in instructions.ROWS:
            assert limits.keys() == {"at_most"}
            continue
        known = {"at_most", "best", "of_roof", "rest", *rows[name].contestants} - {rows[name].subject}
        assert limits.keys() <= known, f"{name}: {sorted(limits.keys() - known)}"
        assert rows[name].rivals or "best" not in limits
        assert rows[name].part is not None or "rest" not in limits
        assert rows[name].roof is not None or "of_roof" not in limits


def test_plot_is_a_picture_or_says_why_not(tmp_path: Path) -> None:
    file = tmp_path / "rows.png"
    found = plot.draw([row(peers={"a": 2.0, "b": 0.5}), row()], file)
    if importlib.util.find_spec("matplotlib") is None:
        assert found is not None and "matplotlib is not installed" in found and not file.exists()
    else:
        assert found is None and file.read_bytes().startswith(b"\x89PNG")
        assert plot.draw([], tmp_path / "none.png") == "no plot: no row has a ratio"
