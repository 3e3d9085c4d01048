"""A serving run says which steps were no replay and why: in its report, its bundle, vLLM's metrics and its log."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from npu_compiler import reasons
from npu_compiler.cli import main
from npu_compiler.inspect import bundle
from npu_compiler.inspect.why_eager import why_eager
from npu_compiler.inspect.why_recapture import why_recapture
from npu_compiler.serving.metrics import StepMetrics, stat_of, step_of
from npu_compiler.serving.steps import Step, StepCounts
from tests.models import checkpoints
from tests.serving.engine import engine, generate, graphs, report

ROOT = Path(__file__).parents[2]
PROMPT = [5, 6, 7]
STEPS = "npu_compiler:steps_total"


@dataclass
class Ran:
    """What a run left: its dump, its report, its log lines, and what the counters said."""

    folder: Path
    report: dict[str, Any]
    lines: list[str]
    counted: dict[tuple[str, str, str], float]


class Lines(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Batches of one to six requests, of which graphs serve up to four; then vLLM captures all again."""
    folder = tmp_path_factory.mktemp("dump")
    settings = graphs("FULL_DECODE_ONLY")
    settings["compilation_config"]["debug_dump_path"] = str(folder)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1e9")  # the test says when
    handler, logger = Lines(), logging.getLogger("vllm.npu_compiler.serving.metrics")
    model = checkpoints.cached(checkpoints.Shape(family="qwen3"))
    with engine(model, disable_log_stats=False, **settings) as llm:
        logger.addHandler(handler)  # an engine configures vLLM's loggers anew as it starts
        logger.setLevel(logging.INFO)
        manager = llm.llm_engine.logger_manager
        manager.stat_loggers.append(PerEngineStatLoggerAdapter(llm.llm_engine.vllm_config, [0], StepMetrics))
        for requests in (1, 3, 6):
            generate(llm, [PROMPT] * requests, 8)
        manager.log()
        manager.log()  # nothing since
        data = report(llm)
        CUDAGraphWrapper.clear_all_graphs()
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        worker.model_runner.capture_model()
        generate(llm, [PROMPT], 4)
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    monkeypatch.undo()
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name == STEPS]
    counted = {tuple(sample.labels[name] for name in ("kind", "mode", "reason")): sample.value for sample in samples}
    yield Ran(folder, data, handler.lines, counted)


def test_the_bundle_has_the_report_and_why_eager_reads_it(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = bundle.all_of(ran.folder)
    assert one.run is not None and one.run.decode_steps.replayed > ran.report["decode_steps"]["replayed"] > 10
    found = {entry.reason: entry for entry in why_eager(ran.folder) if entry.kind != "call"}
    assert set(found) == {"prefill", "decode_too_large"}
    large, prefill = found["decode_too_large"], found["prefill"]
    assert (large.kind, large.smallest, large.largest) == ("decode", 5, 6) or large.largest == 6
    assert large.text == "more tokens than the largest graph: 4" and "max_cudagraph_capture_size" in large.change
    assert large.count == one.run.decode_steps.eager and large.total == one.run.decode_steps.total
    assert prefill.count == prefill.total == one.run.other_steps.eager
    assert prefill.first == 0 < large.first <= large.last < one.run.decode_steps.total + one.run.other_steps.total
    assert sum(count for _, count in large.sizes) == large.count
    assert main(["why-eager", str(ran.folder)]) == 0
    printed = capsys.readouterr().out
    assert f"{large.count} of {large.total} decode steps: more tokens than the largest graph: 4" in printed
    assert "change: raise max_cudagraph_capture_size" in printed


def test_a_report_file_alone_will_do(ran: Ran, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(ran.report))
    assert {entry.reason for entry in why_eager(tmp_path / "run.json")} == {"prefill", "decode_too_large"}


def test_vllms_captures_are_in_the_bundle_and_the_second_ones_say_why(ran: Ran) -> None:
    (one,) = bundle.all_of(ran.folder)
    assert [(entry.mode, entry.tokens) for entry in one.captures] == [("FULL", size) for size in (4, 2, 1)] * 2
    assert [reasons.of(entry.reason).name for entry in one.captures] == [
        *("first_shape", "new_shape", "new_shape"),
        *("cleared", "cleared", "cleared"),
    ]
    (again,) = [entry for entry in why_recapture(ran.folder) if entry.where == str(one)]
    assert again.keys == ("FULL 4 tokens", "FULL 2 tokens", "FULL 1 tokens")
    assert again.milliseconds == pytest.approx(sum(entry.milliseconds for entry in one.captures[3:]))


def test_the_counters_say_what_the_report_says(ran: Ran) -> None:
    (one,) = bundle.all_of(ran.folder)
    assert one.run is not None
    assert ran.counted[("decode", "FULL", "")] == one.run.decode_steps.replayed
    assert ran.counted[("decode", "NONE", "decode_too_large")] == one.run.decode_steps.eager
    assert ran.counted[("other", "NONE", "prefill")] == one.run.other_steps.total
    assert len(ran.counted) == 3


def test_the_log_has_one_line_with_what_to_change(ran: Ran) -> None:
    (line,) = ran.lines
    decode = ran.report["decode_steps"]
    assert f"ascend: {decode['replayed']} of {decode['total']} decode steps replayed; {decode['eager']} not: " in line
    assert "raise max_cudagraph_capture_size" in line and "\n" not in line


def test_a_step_comes_through_vllms_messages() -> None:
    """From the engine's process to the front end they are typed msgpack."""
    step = Step(True, "NONE", 5, 5, reason=reasons.DECODE_TOO_LARGE)
    sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(cudagraph_stats=stat_of(step)))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert step_of(received.scheduler_stats.cudagraph_stats) == step
    replay = Step(False, "FULL", 3, 4)
    assert step_of(stat_of(replay)) == replay


def test_the_entry_point_is_what_vllm_asks_for() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["vllm.stat_logger_plugins"]["ascend_metrics"].partition(":")
    assert getattr(import_module(module), name) is StepMetrics and issubclass(StepMetrics, StatLoggerBase)


def test_a_line_is_short_where_all_went_well() -> None:
    counts = StepCounts()
    for _ in range(1234):
        counts.add(Step(True, "FULL", 4, 4))
    assert counts.line() == "ascend: 1,234 of 1,234 decode steps replayed"
