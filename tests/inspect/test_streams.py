"""The streams that a capture was planned on, as a stage of their own: on the page, in `diff`, and as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from npu_compiler.inspect import bundle, show
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.diff import differences
from npu_compiler.inspect.page.changes import changes
from npu_compiler.inspect.page.data import page_data
from npu_compiler.inspect.streams import planned


def branches(x: Tensor, weight: Tensor) -> Tensor:
    left, right = x, x
    for _ in range(4):
        left = torch.relu(left @ weight)
        right = (right * 1.5).sin()
    return left + right


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for multistream in ("auto", "off"):
        found[multistream] = tmp_path_factory.mktemp(multistream)
        options = {"dump": str(found[multistream]), "multistream": multistream}
        torch._dynamo.reset()
        inputs = torch.rand(32, 16).npu(), torch.rand(16, 16).npu()
        with torch.inference_mode():
            torch.compile(branches, backend="ascend", options=options)(*inputs)
    return found


def graph_of(folder: Path) -> StoredGraph:
    (graph,) = bundle.open(folder).graphs
    return graph


def test_the_plan_moves_calls_to_side_streams_and_has_them_waited_for(folders: dict[str, Path]) -> None:
    graph = graph_of(folders["auto"])
    (capture,) = graph.captures
    final = graph.program(graph.stage("final"))
    placed = planned(final, capture)
    assert [call.model_copy(update={"stream": 0, "waits": ()}) for call in placed.calls] == list(final.calls)
    stream_of = {step.node: step.stream for step in capture.steps}
    assert {call.name: call.stream for call in placed.calls if call.name in stream_of} == stream_of
    assert max(stream_of.values()) == 1
    maker = {call.name: call for call in placed.calls}
    for call in placed.calls:
        assert all(name == "the start" or maker[name].stream != call.stream for name in call.waits)
    crossed = [call.name for call in placed.calls for name in call.inputs() if maker[name].stream != call.stream]
    assert any(maker[name].waits for name in crossed)

    delta = changes(final, placed)
    assert not (delta.added or delta.removed or delta.moved)
    assert {entry.name for entry in delta.changed} == {call.name for call in placed.calls if call.stream or call.waits}
    assert all(entry.before == {"stream": "main stream"} for entry in delta.changed)


def test_the_page_and_the_text_have_a_stage_for_it(folders: dict[str, Path]) -> None:
    one = bundle.open(folders["auto"])
    data = page_data(one, one.graphs)
    (graph,), texts = data["graphs"], data["texts"]
    final, streams = graph["stages"][-2:]
    assert (final["name"], streams["name"]) == ("final", "streams: static")
    assert streams["program"] == final["program"] and len(streams["changes"]["changed"]) == len(streams["streams"])
    assert any(texts[number].startswith("side stream 1, behind ") for number in streams["streams"].values())
    assert " calls on side streams, " in streams["note"]
    assert "  streams: static: " in show.pipeline(one.graph())

    other = bundle.open(folders["off"])
    assert page_data(other, other.graphs)["graphs"][0]["stages"][-1]["name"] == "final"
    assert "streams: static" not in show.pipeline(other.graph())


def test_diff_names_the_first_call_that_runs_elsewhere(folders: dict[str, Path]) -> None:
    found = differences(*(bundle.open(folders[kind]) for kind in ("auto", "off")))
    assert [entry.stage for entry in found] == ["options", "streams: static"]
    streams = found[-1]
    assert streams.left != streams.right and "main stream" in streams.right
    assert str(Path(__file__).name) in streams.place
    assert not differences(bundle.open(folders["auto"]), bundle.open(folders["auto"]))
