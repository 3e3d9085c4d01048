"""The row of vLLM's decode step: what a step takes beside the replay of its graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import row_vllm


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_step_is_longer_than_its_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--rows", "vllm_decode_b1", "--results", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "vllm_decode_b1.json").read_text())
    records = {record["peer"]: record for record in stored["records"]}
    assert list(records) == [*row_vllm.MODES, row_vllm.REPLAY]
    assert not any(record["missing"] for record in records.values())
    step, replay = records[row_vllm.FULL], records[row_vllm.REPLAY]
    assert 0 < replay["median"] < step["median"] < records[row_vllm.NONE]["median"]
    assert step["rest_min"] <= step["rest"] <= step["rest_max"] < step["max"]
    assert step["goal"] == "<= 1500 us beside its part" and isinstance(step["met"], bool)
    assert [records[mode]["max_abs_error"] for mode in row_vllm.MODES] == [0.0] * 3  # the tokens agree
    assert "FULL_DECODE_ONLY beside its part:" in capsys.readouterr().out
