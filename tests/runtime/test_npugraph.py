"""torch_npu's NPUGraph on the host runtime: capture, replay, updates, and what a capture refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_npu

from npu_compiler.runtime import counters
from tests.runtime.program import output_of

npu = torch.npu


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


def captured(body: Callable[[], object]) -> npu.NPUGraph:
    graph = npu.NPUGraph()
    with npu.graph(graph):
        body()
    return graph


def test_replay_computes_from_what_the_inputs_hold() -> None:
    x = torch.zeros(4, 8, device="npu")
    weight = torch.randn(8, 8, device="npu")
    out = torch.empty(4, 8, device="npu")

    def body() -> None:
        out.copy_(torch.relu(x @ weight) + 1)

    body()
    graph = captured(body)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(4, 8, generator=generator)
        x.copy_(value)
        graph.replay()
        torch.testing.assert_close(out.cpu(), torch.relu(value @ weight.cpu()) + 1)


def test_a_replay_is_one_task_and_no_synchronisation() -> None:
    x = torch.zeros(16, device="npu")
    graph = captured(lambda: [x.add_(1) for _ in range(20)])
    npu.synchronize()
    before = counters.read()
    for _ in range(10):
        graph.replay()
    grown = counters.difference(before)
    assert grown["graph_launches"] == 10
    assert grown["tasks"] == 10
    assert grown["host_synchronizations"] == 0
    npu.synchronize()
    assert counters.difference(before)["graph_nodes"] == 200
    assert x.cpu().tolist() == [200.0] * 16


def test_side_streams_fork_and_join() -> None:
    x, left, right = (torch.ones(8, device="npu") for _ in range(3))
    side = npu.Stream()

    def body() -> None:
        x.add_(1)
        side.wait_stream(npu.current_stream())
        with npu.stream(side):
            right.copy_(x * 3)
        left.copy_(x * 2)
        npu.current_stream().wait_stream(side)
        x.copy_(left + right)

    graph = captured(body)
    x.fill_(1)
    graph.replay()
    assert x.cpu().tolist() == [10.0] * 8


def test_graphs_share_a_pool() -> None:
    x = torch.ones(1 << 20, device="npu")
    graphs, results = [], []
    pool = npu.graph_pool_handle()
    for factor in range(1, 4):
        graph = npu.NPUGraph()
        with npu.graph(graph, pool=pool):
            results.append((x * factor).sum())
        graphs.append(graph)
    for factor, graph in enumerate(graphs, start=1):
        graph.replay()
        assert results[factor - 1].item() == factor * (1 << 20)
    graphs[0].reset()


def test_random_numbers_differ_between_replays() -> None:
    noise = torch.empty(1000, device="npu")
    graph = captured(noise.uniform_)
    graph.replay()
    first = noise.cpu()
    graph.replay()
    second = noise.cpu()
    assert not torch.equal(first, second)
    assert 0.4 < second.mean().item() < 0.6


def test_task_groups_are_updated_in_stream_order() -> None:
    x, y, z = (torch.full((4,), float(value), device="npu") for value in (1, 10, 100))
    out = torch.zeros(4, device="npu")
    npu.synchronize()  # they were made on another stream
    graph = npu.NPUGraph()
    stream, update = npu.Stream(), npu.Stream()
    event = npu.ExternalEvent()
    with npu.stream(stream):
        graph.capture_begin()
        event.wait(stream)
        event.reset(stream)
        npu.graph_task_group_begin(stream)
        torch.add(x, y, out=out)
        handle = npu.graph_task_group_end(stream)
        out.mul_(2)
        graph.capture_end()
    for other, expected in ((y, 22.0), (z, 202.0), (y, 22.0)):
        with npu.stream(stream):
            graph.replay()
        with npu.stream(update):
            npu.graph_task_update_begin(update, handle)
            torch.add(x, other, out=out)
            npu.graph_task_update_end(update)
            event.record(update)
        stream.synchronize()
        assert out.cpu().tolist() == [expected] * 4


def test_an_update_with_other_tasks_is_refused() -> None:
    x = torch.ones(4, device="npu")
    graph = npu.NPUGraph()
    stream, update = npu.Stream(), npu.Stream()
    with npu.stream(stream):
        graph.capture_begin()
        npu.graph_task_group_begin(stream)
        x.add_(1)
        handle = npu.graph_task_group_end(stream)
        graph.capture_end()
    with npu.stream(update):
        npu.graph_task_update_begin(update, handle)
        with pytest.raises(RuntimeError, match="0 tasks and the task group 1"):
            npu.graph_task_update_end(update)
    graph.replay()
    assert x.cpu().tolist() == [2.0] * 4


def test_debug_dump_is_a_trace(tmp_path: Path) -> None:
    x = torch.ones(4, device="npu")
    streams = npu.Stream(), npu.Stream()

    def body() -> None:
        # torch_npu gives the streams of a pool in turn: one of two is not the one that captures.
        side = next(stream for stream in streams if stream != npu.current_stream())
        side.wait_stream(npu.current_stream())
        with npu.stream(side):
            x.add_(1)
        npu.current_stream().wait_stream(side)

    graph = captured(body)
    path = tmp_path / "graph.json"
    with pytest.warns(UserWarning, match="debug_dump"):
        graph.debug_dump(str(path))
    events = json.loads(path.read_text())
    assert any(event["args"]["Task Type"] == "KERNEL" for event in events)
    assert len({event["tid"] for event in events}) == 2
    assert json.loads((tmp_path / "graph.aligned.json").read_text())  # torch_npu could align records and waits


REFUSED = {
    "npu.current_stream().synchronize()": "107027",
    "npu.current_stream().query()": "107027",
    "npu.synchronize()": "107027",
    "x.cpu()": "107030",  # a blocking copy
    "x.copy_(torch.ones(4))": "107030",
    "x.sum().item()": "107027",
    "event = npu.Event(); event.record(); event.synchronize()": "107028",
}


def test_what_a_capture_refuses() -> None:
    """In a process of its own: torch_npu may keep the error of a task that it queued."""
    text = output_of(
        f"""
        npu = torch.npu
        npu.set_device(0)
        x = torch.ones(4, device="npu")
        for body, code in {REFUSED!r}.items():
            try:
                with npu.graph(npu.NPUGraph()):
                    x.add_(1)
                    exec(body)
                print("accepted:", body)
            except RuntimeError as error:
                text = str(error)
                print("refused" if code in text and "host runtime" in text else f"{{body}}: {{text}}")
        """
    )
    assert text.splitlines()[-len(REFUSED) :] == ["refused"] * len(REFUSED), text


def test_the_default_stream_cannot_be_captured() -> None:
    graph = npu.NPUGraph()
    with npu.stream(npu.default_stream()), pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()


def test_a_stream_that_is_not_joined_is_an_error() -> None:
    text = output_of(
        """
        npu = torch.npu
        npu.set_device(0)
        x = torch.ones(4, device="npu")
        side = npu.Stream()
        try:
            with npu.graph(npu.NPUGraph()):
                side.wait_stream(npu.current_stream())
                with npu.stream(side):
                    x.add_(1)
        except RuntimeError as error:
            print("107025" in str(error) and "aclnn" in str(error))
        x.add_(1)
        print(x.cpu().tolist())
        """
    )
    assert text.splitlines()[-2:] == ["True", "[2.0, 2.0, 2.0, 2.0]"]


def test_graphs_spend_the_stream_budget() -> None:
    text = output_of(
        """
        npu = torch.npu
        npu.set_device(0)
        x = torch.ones(4, device="npu")
        graphs = []
        try:
            for _ in range(200):
                graph = npu.NPUGraph()
                with npu.graph(graph):
                    x.add_(1)
                graphs.append(graph)
        except RuntimeError as error:
            print("207008" in str(error) and "capture fewer sizes" in str(error), 0 < len(graphs) < 200)
        """,
        NPU_COMPILER_HOST="streams=128",
    )
    assert text.splitlines()[-1] == "True True"


def test_replay_after_reset_is_refused() -> None:
    graph = captured(lambda: torch.ones(2, device="npu").add_(1))
    graph.replay()
    npu.synchronize()
    graph.reset()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_the_runtime_is_the_hosts() -> None:
    assert torch_npu.npu.is_available()
    assert counters.read()["captures"] >= 0
