"""The command that measures what a bundle costs, and the goal that it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_bundle_costs_no_more_than_the_compilation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "--parts", "standalone", "--layers", "4", "--turns", "1", "--results", str(tmp_path)]) == 0
    rows = {entry["row"]: entry for entry in json.loads((tmp_path / "dump.json").read_text())["records"]}
    assert rows["dump_ratio"]["value"] == pytest.approx(
        rows["compile_dumped"]["value"] / rows["compile_plain"]["value"]
    )
    assert rows["dump_ratio"]["met"] and rows["bundle"]["value"] > 0.5
    assert "goal <= 2: met" in capsys.readouterr().out
