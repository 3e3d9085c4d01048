"""Instructions of replays: counted by valgrind where it is installed, and what is said where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import instructions


@pytest.mark.full
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed (Debian: apt install valgrind)")
def test_counts_repeat_and_grow_with_the_nodes() -> None:
    few, many = instructions.counts([("add", 10), ("add", 110)])
    assert few[1] == few[2] and many[1] == many[2]
    by_node = (many[1] - few[1]) / 100
    # An addition of 16 floats is two vectors of AVX2, or four without it, and a call.
    assert 10 < by_node < 400


def test_a_machine_without_valgrind_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["instructions", "--results", str(tmp_path)]) == 1
    assert "apt install valgrind" in capsys.readouterr().out
    for row in instructions.ROWS:
        (record,) = json.loads((tmp_path / f"{row}.json").read_text())["records"]
        assert record["median"] is None and "apt install valgrind" in record["missing"]


def test_a_dump_without_a_sum_is_refused() -> None:
    assert instructions.total("positions: line\nsummary: 94169\n") == 94169
    with pytest.raises(ValueError, match="without a summary"):
        instructions.total("positions: line\n")
