"""Token dropping through vLLM: tokens with room for all, and what is dropped in report and metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY
from torch import fx
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from npu_compiler import fusion_kernels
from npu_compiler.backend import DropCounts, Dropped
from npu_compiler.inspect import bundle
from npu_compiler.serving import device_reader, drops
from npu_compiler.serving.metrics import StepMetrics, counted_of, stat_of, step_of
from npu_compiler.serving.steps import Step
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.test_moe import folder  # noqa: F401  # the same model

STEP = Step(True, "FULL", 3, 4)
LAYERS = checkpoints.Shape().layers


@pytest.mark.full
def test_tokens_with_room_for_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Also of steps with fewer tokens than ranks; every step's tokens are counted, its padding is not."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # a program that is loaded is not dumped
    prompts = oracle.prompts()[:4]
    expected = [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    options = {"compile": {"token_drop": {"max_drop_ratio": 0.0}, "dump": str(tmp_path)}}
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True}
    settings |= {"enable_prefix_caching": False, "additional_config": options, **graphs("FULL_DECODE_ONLY")}
    with engine(folder, **settings) as llm:
        assert generate(llm, prompts, 16) == expected
        reports = llm.collective_rpc("report")
    rows = 2 * (sum(map(len, prompts)) + len(prompts) * 15)  # two experts a token; the last token is not read
    assert len(reports) == 2
    for data in reports:
        assert data["decode_steps"]["replayed"] > 0
        assert data["decode_steps"]["eager"] == 0
        assert [(entry["routed"], entry["dropped"]) for entry in data["dropped"]] == [(rows, 0)] * LAYERS
        assert all(1 <= entry["needed"] <= 2 for entry in data["dropped"])
        assert [entry["layer"] for entry in data["dropped"]] == [
            f"model.layers.{index}.mlp.experts" for index in range(LAYERS)
        ]
    for item in bundle.all_of(tmp_path):
        (program,) = [graph.program(graph.stage("final")) for graph in item.graphs]
        targets = [call.target for call in program.calls]
        assert targets.count("npu_fused.all_to_all_dispatch.default") == LAYERS


@pytest.fixture
def counts() -> DropCounts:
    """Of a program with one layer, whose counters say 8 rows, 3 of them dropped, 1.5 needed."""
    fusion_kernels.register()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, device="npu")
    graph.call_function(torch.ops.npu_fused.all_to_all_dispatch.default, (x, "counter")).name = "layer"
    made = DropCounts(graph)
    made.memory.copy_(torch.tensor([[8, 3, 15_000]]))
    return made


def test_reading_waits_for_nothing(counts: DropCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_reader, "INTERVAL", 0.0)
    reader = drops.DropReader([])
    assert reader.take() == []
    reader.ask([counts])
    reader._copies._done, done = (
        SimpleNamespace(query=lambda: False),
        reader._copies._done,
    )  # as if the device were busy
    assert reader.take() == []
    counts.memory.add_(1)
    reader.ask([counts])  # one copy at a time
    reader._copies._done = done
    torch.npu.synchronize()
    (found,) = reader.take()
    assert (found.routed, found.dropped, found.needed) == (8, 3, 1.5)
    assert reader.take() == []
    reader.ask([counts])
    torch.npu.synchronize()
    assert [(entry.routed, entry.dropped) for entry in reader.take()] == [(9, 4)]
    reader.ask([counts])
    torch.npu.synchronize()
    assert reader.take() == [], "nothing has changed"
    counts.clear()
    reader.wait([counts])
    assert [(entry.routed, entry.ratio) for entry in reader.latest] == [(0, 0.0)]


def test_a_layer_that_is_compiled_twice_is_one() -> None:
    entries = [Dropped("a", 4, 1, 1.5), Dropped("b", 4, 0, 1.0), Dropped("a", 6, 0, 1.25)]
    assert drops.by_layer(entries) == [Dropped("a", 10, 1, 1.5), Dropped("b", 4, 0, 1.0)]


def test_a_layer_has_the_name_that_vllm_has_for_it() -> None:
    """Compiled is a part of the model, whose paths begin in it."""
    layers = ["language_model.model.layers.1.mlp.experts", "language_model.model.layers.11.mlp.experts"]
    assert [drops.full_name(f"layers.{number}.mlp.experts", layers) for number in (1, 11)] == layers
    assert drops.full_name("model.py:8: y = x", layers) == "model.py:8: y = x"


def value(name: str, layer: str) -> float | None:
    return REGISTRY.get_sample_value(f"npu_compiler:{name}", {"model_name": "m", "engine": "0", "layer": layer})


def test_metrics() -> None:
    """Through vLLM's messages; a report that is cleared starts again, the metrics go on."""
    metrics = StepMetrics(SimpleNamespace(model_config=SimpleNamespace(served_model_name="m")))  # type: ignore[arg-type]
    layer = "model.layers.0.mlp; dropped"
    for now in ([Dropped(layer, 10, 2, 1.5)], [], [Dropped(layer, 30, 2, 1.5)], [Dropped(layer, 5, 1, 1.25)]):
        sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(cudagraph_stats=stat_of(STEP, now)))
        received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
        assert counted_of(received.scheduler_stats.cudagraph_stats) == (now, [])
        assert step_of(received.scheduler_stats.cudagraph_stats) == STEP
        metrics.record(received.scheduler_stats, None)
    assert value("routed_rows_total", layer) == 35
    assert value("dropped_rows_total", layer) == 3
    assert value("needed_capacity_factor", layer) == 1.25
