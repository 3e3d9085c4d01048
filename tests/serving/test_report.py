"""The run report counts what it was told, and its file is always whole."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from npu_compiler.backend import CompiledGraph
from npu_compiler.config import Options
from npu_compiler.inspect.run import Run
from npu_compiler.passes.record import Fired as FiredRule
from npu_compiler.passes.record import PassRecord
from npu_compiler.reasons import DECODE_TOO_LARGE, PIECES, PREFILL
from npu_compiler.serving.fired import Fired
from npu_compiler.serving.report import GraphRecord, ReportFile, RunReport
from npu_compiler.serving.steps import Step


def step(**changes: object) -> Step:
    values = {"decode": True, "mode": "FULL", "tokens": 3, "padded_tokens": 4, "generated": 3} | changes
    return Step(**values)  # type: ignore[arg-type]


def test_counts() -> None:
    report = RunReport()
    report.add(step())
    report.add(step(tokens=4, generated=4))
    report.add(step(mode="NONE", tokens=9, padded_tokens=9, generated=9, reason=DECODE_TOO_LARGE, detail="8"))
    report.add(step(decode=False, mode="PIECEWISE", tokens=7, padded_tokens=8, generated=1, reason=PIECES))
    data = report.as_dict()
    assert data["decode_steps"] == {"total": 3, "replayed": 2, "piecewise": 0, "eager": 1}
    assert data["other_steps"] == {"total": 1, "replayed": 0, "piecewise": 1, "eager": 0}
    large, pieces = data["not_replayed"]
    assert (large["reason"], large["detail"], large["steps"], large["first"], large["last"]) == (
        *("decode_too_large", "8", 1, 2, 2),
    )
    assert (pieces["reason"], pieces["kind"], pieces["mode"], pieces["sizes"]) == (
        *("pieces", "other", "PIECEWISE", [[7, 1]]),
    )
    assert data["padding_waste"] == pytest.approx(2 / 16)
    assert data["generated_tokens"] == 17


def test_serving_time_leaves_out_idle_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 30.0, 30.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    report = RunReport()
    for _ in range(4):
        report.add(step())
    assert report.as_dict()["serving_seconds"] == pytest.approx(0.75)
    assert report.as_dict()["tokens_per_second"] == pytest.approx(12 / 0.75)


def test_passes_that_fired() -> None:
    """Of all programs of an engine, whoever asks first; equal layers count each."""
    config = SimpleNamespace()
    held = Fired.of(config)  # type: ignore[arg-type]
    report = RunReport(passes=held.rewrites)
    assert "passes that fired: none" in report.text()
    assert Fired.of(config) is held  # type: ignore[arg-type]
    compiled = CompiledGraph("", Options())
    rewrite = FiredRule("swiglu", "", (), None, 3)
    compiled.records = [PassRecord("noop"), PassRecord("swiglu", fired=[rewrite, rewrite])]
    held.add(compiled)
    other = Fired.of(SimpleNamespace())  # type: ignore[arg-type]
    assert not other.rewrites
    report.clear()
    assert report.as_dict()["passes"] == {"swiglu": 6}
    assert "passes that fired: swiglu 6" in report.text()
    assert Run.model_validate(report.as_dict()).passes == {"swiglu": 6}


def test_pieces_of_one_size_are_one_row() -> None:
    pieces = [
        GraphRecord("PIECEWISE", 4, None, 2.0, 1.0, replays=5),
        GraphRecord("PIECEWISE", 4, None, 3.0, 0.5, replays=5),
    ]
    report = RunReport(graphs=[*pieces, GraphRecord("FULL", 4, 4, 1.0, 0.0)])
    rows = report.as_dict()["graphs"]
    assert [(row["mode"], row["milliseconds"], row["mebibytes"], row["replays"]) for row in rows] == [
        ("PIECEWISE", 5.0, 1.5, 5),
        ("FULL", 1.0, 0.0, 0),
    ]
    assert pieces[0].milliseconds == 2.0  # the records themselves are left alone


def test_clear_keeps_the_graphs() -> None:
    report = RunReport(graphs=[GraphRecord("FULL", 1, 1, 1.0, 0.0, replays=3)])
    report.add(step())
    report.clear()
    data = report.as_dict()
    assert (data["decode_steps"]["total"], data["generated_tokens"], data["graphs"][0]["replays"]) == (0, 0, 0)
    assert len(data["graphs"]) == 1


def test_text_names_the_reason() -> None:
    report = RunReport()
    for tokens in (257, 300):
        report.add(step(mode="NONE", tokens=tokens, reason=DECODE_TOO_LARGE, detail="256"))
    report.add(step())
    report.add(step(mode="NONE", decode=False, tokens=9, reason=PREFILL, detail="FULL_DECODE_ONLY"))
    assert (
        "ascend: 1 of 3 decode steps replayed; 2 not: more tokens than the largest graph: 256 (257 to 300 tokens), "
        "raise max_cudagraph_capture_size"
    ) in report.text()
    assert "; 0 of 1 other steps replayed; 1 not: the batch holds prefill, which the mode has no" in report.text()


def test_file_is_written_at_once_and_at_the_interval(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    file = ReportFile([str(path)], interval=3600)
    report = RunReport(model="m")
    file.update(report)
    assert not path.exists()
    file.write(report)
    assert json.loads(path.read_text())["model"] == "m"
    assert list(path.parent.iterdir()) == [path]
