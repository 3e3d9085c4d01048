"""Counting tasks in captured graphs, on graphs whose tasks are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks import captured, kernels


def capture(count: int) -> torch.npu.NPUGraph:
    graph, x = torch.npu.NPUGraph(), torch.ones(16, device="npu")
    with torch.npu.graph(graph):
        for _ in range(count):
            x = torch.exp(x + 1.0)
    return graph


def test_tasks_of_a_graph_are_its_operators_in_order() -> None:
    graph = capture(3)
    assert captured.tasks(graph).kernels == ("aclnnAdds", "aclnnExp") * 3
    assert any(found is graph for found in captured.graphs())


def test_events_between_streams_are_no_kernels() -> None:
    graph, x, side = torch.npu.NPUGraph(), torch.ones(16, device="npu"), torch.npu.Stream()
    with torch.npu.graph(graph):
        y = x + 1.0
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y = torch.exp(y)
        torch.npu.current_stream().wait_stream(side)
    found = captured.tasks(graph)
    assert found.kernels == ("aclnnAdds", "aclnnExp")
    assert found.control == 4


def test_a_layer_is_what_a_deeper_model_has_more_of() -> None:
    shallow, deep = captured.tasks(capture(2)).kernels, captured.tasks(capture(6)).kernels
    assert sorted(captured.one_layer(shallow, deep, 4)) == ["aclnnAdds", "aclnnExp"]


def test_unequal_layers_are_given_as_counts() -> None:
    assert captured.one_layer(["A", "B"], ["A", "B", "A", "C", "A"], 2) == ["A x 1", "C x 0.5"]


@pytest.mark.parametrize("backend", ["ascend", "npugraphs"])
def test_a_compiled_model_is_counted(backend: str) -> None:
    found = kernels.measure(backend, "llama", (1, 2))
    assert found["missing"] is None
    assert found["kernels"] == found["model_kernels"][1] - found["model_kernels"][0] > 8
    assert any("Matmul" in name for name in found["layer"])
