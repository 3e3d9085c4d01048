"""Timelines: every task that ran, with the call of the program it belongs to, and what they add up to."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_compiler
from npu_compiler import cli
from npu_compiler.backend import AscendBackend
from npu_compiler.errors import TraceError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.join import join, operator
from npu_compiler.inspect.timeline import Task, read, summary, tasks_of, timeline
from npu_compiler.runtime import counters


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return nn.functional.silu(left) * right


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32, bias=False), Gate(), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x))) + x


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, int]]:
    """A trace of three replays, the bundle of the program, and what the counters said of the three."""
    folder, file = tmp_path_factory.mktemp("dump"), tmp_path_factory.mktemp("trace") / "run.json"
    torch._dynamo.reset()
    run = torch.compile(Block().npu(), backend=AscendBackend(), options={"dump": str(folder)})
    x = torch.rand(4, 8).npu()
    with torch.inference_mode():
        run(x)
        before = counters.read()
        with npu_compiler.trace(file) as recording:
            for number in range(3):
                with recording.span(f"step {number}", tokens=4):
                    run(x)
    return file, folder, counters.difference(before)


def test_every_task_is_there_with_its_call(recorded: tuple[Path, Path, dict[str, int]]) -> None:
    file, folder, counted = recorded
    events = read(file)
    tasks = [event for event in events if event.get("cat") == "task"]
    nodes = [event for event in tasks if "replay_of" in event["args"]]
    replays = [event for event in events if event.get("cat") == "replay"]
    assert len(replays) == counted["graph_launches"] == 3
    assert len(nodes) == counted["graph_nodes"]
    assert len(tasks) - len(nodes) + len(replays) == counted["tasks"]
    kernels = [event for event in nodes if event["name"].startswith("aclnn")]
    assert {"up", "gate", "down"} <= {event["args"].get("module") for event in kernels}
    (swiglu, *_) = [event["args"] for event in kernels if event["args"]["call"] == "npu_fused.swiglu.default"]
    assert (swiglu["module"], swiglu["pass"]) == ("gate", "swiglu")
    assert "silu(left) * right" in swiglu["source"] and "test_trace.py:" in swiglu["source"]
    graph = bundle.open(folder).graph()
    (captured,) = graph.captures
    assert [(task.name, task.node) for task in captured.tasks] == [
        (event["name"], event["args"].get("node", "")) for event in nodes[: len(captured.tasks)]
    ]
    known = {call.name for call in graph.program(graph.stage("final")).calls}
    assert {task.node for task in captured.tasks if task.node} <= known


METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


def check_format(file: Path) -> None:
    """The rules of Chrome's Trace Event Format: fields and types by phase, the slices of a line apart or within each
    other, both ends of an arrow within slices."""
    document = json.loads(file.read_bytes())
    assert document["displayTimeUnit"] in ("ms", "ns") and isinstance(document["otherData"], dict)
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    ends: dict[str, dict[int, tuple[tuple[int, int], int]]] = {"s": {}, "f": {}}
    for event in document["traceEvents"]:
        phase, line = event["ph"], (event["pid"], event["tid"])
        assert all(type(number) is int and 0 <= number < 2**32 for number in line)
        assert isinstance(event["name"], str) and event["name"]
        if phase == "M":
            assert type(event["args"][METADATA[event["name"]]]) is (int if "sort" in event["name"] else str)
            continue
        assert isinstance(event["cat"], str) and isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        begin = round(event["ts"] * 1000)
        if phase == "X":
            assert event["dur"] >= 0 and isinstance(event["args"], dict)
            slices[line].append((begin, begin + round(event["dur"] * 1000)))
        else:
            assert (event["name"], event["cat"]) == ("launch", "launch") and event["id"] not in ends[phase]
            assert phase == "s" or event["bp"] == "e"
            ends[phase][event["id"]] = (line, begin)
    for own in slices.values():
        around: list[int] = []
        for begin, end in sorted(own, key=lambda entry: (entry[0], -entry[1])):
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1]
            around.append(end)
    assert ends["s"].keys() == ends["f"].keys()
    for launch, (line, begin) in ends["s"].items():
        target, arrived = ends["f"][launch]
        assert begin <= arrived
        for place, time in ((line, begin), (target, arrived)):
            assert any(first <= time <= last for first, last in slices[place])


def of_launch(events: list[dict[str, Any]], category: str, replay: dict[str, Any]) -> list[dict[str, Any]]:
    found = [event for event in events if event.get("cat") == category]
    return [event for event in found if event["args"].get("launch") == replay["args"]["launch"]]


def within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    rounding = 0.01  # of microseconds since the machine's start, as floats
    end = outer["ts"] + outer["dur"] + rounding
    return bool(outer["ts"] - rounding <= inner["ts"] and inner["ts"] + inner["dur"] <= end)


def test_events_lie_as_the_device_worked(recorded: tuple[Path, Path, dict[str, int]]) -> None:
    check_format(recorded[0])
    events = read(recorded[0])
    replays = [event for event in events if event.get("cat") == "replay"]
    for replay in replays:
        inner = of_launch(events, "task", replay)
        places = [event["args"]["task"] for event in inner]
        assert places == sorted(places) and len(set(places)) == len(places)
        assert all(within(event, replay) for event in inner)
        (launch,) = of_launch(events, "call", replay)
        assert launch["name"] == replay["name"] and launch["ts"] <= replay["ts"]
        assert replay["args"]["queued_us"] >= 0
    steps = [event for event in events if event.get("cat") == "step"]
    assert [step["name"] for step in steps] == ["step 0", "step 1", "step 2"]
    assert steps[0]["args"] == {"tokens": 4}
    for step, replay in zip(steps, replays, strict=True):
        (launch,) = of_launch(events, "call", replay)
        assert step["ts"] <= launch["ts"] <= step["ts"] + step["dur"]
    arrows = {kind: {event["id"] for event in events if event["ph"] == kind} for kind in ("s", "f")}
    assert arrows["s"] == arrows["f"] and arrows["s"]
    named = {(event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X" and event["cat"] != "step"} <= named


def test_uncaptured_calls_name_their_node_too_and_nothing_is_recorded_outside(tmp_path: Path) -> None:
    run = torch.compile(lambda x: x.exp() + 1, backend="ascend", options={"capture": False})
    x = torch.rand(4).npu()
    run(x)
    with npu_compiler.trace(tmp_path / "a.json.gz"):
        run(x)
        x.sin()
    run(x)
    said = {task.name: task.said.get("call") for task in tasks_of(read(tmp_path / "a.json.gz"))}
    assert said["aclnnExp"] == "aten.exp.default" and said["aclnnSin"] is None
    with npu_compiler.trace(tmp_path / "b.json"):
        x.cos()
    assert [task.name for task in tasks_of(read(tmp_path / "b.json")) if task.name.startswith("aclnn")] == ["aclnnCos"]


def test_streams_of_a_graph_have_lines_of_their_own(tmp_path: Path) -> None:
    weights = [torch.rand(256, 256).npu() for _ in range(8)]

    def branches(x: Tensor) -> Tensor:
        left, right = x, x
        for weight in weights:
            left, right = (left @ weight).sin(), (right @ weight).cos()
        return left + right

    run = torch.compile(branches, backend="ascend", options={"multistream": "auto"})
    x = torch.rand(64, 256).npu()
    with torch.inference_mode():
        run(x)
        with npu_compiler.trace(tmp_path / "run.json"):
            run(x)
    check_format(tmp_path / "run.json")
    found = timeline(tmp_path / "run.json")
    assert any("graph stream 1" in stream.name for stream in found.streams)
    assert 0 <= found.together <= min(sorted(stream.busy for stream in found.streams)[-2:])
    assert "us (" in next(line for line in str(found).splitlines() if line.startswith("  at once: "))
    assert sum(stream.tasks for stream in found.streams) == len(tasks_of(read(tmp_path / "run.json")))


def test_one_recording_at_a_time_and_a_full_one_says_what_it_dropped(tmp_path: Path) -> None:
    x = torch.rand(4).npu()
    with npu_compiler.trace(tmp_path / "a.json", limit=30):
        for _ in range(20):
            x = x + 1
            torch.npu.current_stream().synchronize()
        with pytest.raises(TraceError, match="being recorded already"), npu_compiler.trace(tmp_path / "b.json"):
            pass
    found = timeline(tmp_path / "a.json")
    events = [event for event in read(tmp_path / "a.json") if event["ph"] == "X"]
    assert len(events) == 30 and found.dropped >= 5
    assert f"{found.dropped} events were dropped" in str(found)


def test_what_an_error_ends_is_written(tmp_path: Path) -> None:
    x = torch.rand(4).npu()
    with pytest.raises(ValueError, match="mine"), npu_compiler.trace(tmp_path / "run.json"):
        x.exp()
        raise ValueError("mine")
    assert "aclnnExp" in [task.name for task in tasks_of(read(tmp_path / "run.json"))]
    with pytest.raises(TraceError, match="no trace can be written"), npu_compiler.trace(tmp_path):
        pass
    with npu_compiler.trace(tmp_path / "again.json"):
        x.exp()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read"),
        (b"{", "can't be read"),
        (gzip.compress(b"[]", mtime=0)[:-4], "can't be read"),  # the time of day would be part of the test's name
        (b'{"traceEvents": 3}', "no list of events"),
        (b"[1]", "no list of events"),
        (b"[]", "no task of a device"),
        (b'[{"ph": "X", "cat": "task", "name": "a"}]', "of another form"),
    ],
    ids=("nothing", "half a text", "half a file", "a number", "numbers", "no events", "half an event"),
)
def test_what_is_no_trace_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(TraceError, match=message):
        timeline(tmp_path / "run.json")
    assert cli.main(["trace", str(tmp_path / "run.json")]) == 2


def test_figures() -> None:
    """Two streams: 0-10 a, 12-20 b on one, 5-9 c on the other; 30-40 d, which the host launched at 27."""
    tasks = [
        Task("a", "0", 0, 10, said={"module": "m", "source": "s"}),
        Task("c", "1", 5, 9),
        Task("wait", "1", 9, 12, waits=True),
        Task("b", "0", 12, 20, launched=11.0),
        Task("d", "0", 30, 40, launched=27.0),
    ]
    found = summary("x", tasks, [])
    assert (found.microseconds, found.together) == (40, 4)
    assert [(stream.busy, stream.waiting, stream.idle) for stream in found.streams] == [(28, 0, 12), (4, 3, 33)]
    assert [(gap.before, gap.after, gap.microseconds, gap.host) for gap in found.gaps] == [
        ("b", "d", 10, 7),
        ("a", "b", 2, 1),
    ]
    assert (found.critical.tasks, found.critical.host, found.critical.other) == (28, 8, 4)
    assert [total.name for total in found.critical.longest] == ["a", "d", "b"]
    assert [(total.name, total.count) for total in found.places] == [("m at s", 1)]


def test_command(recorded: tuple[Path, Path, dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(recorded[0]), "--top", "50"]) == 0
    text = capsys.readouterr().out
    assert "critical path: " in text and "silu(left) * right" in text and " 1 x step 0" in text
    assert cli.main(["trace", str(recorded[0]), "--json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert data == timeline(recorded[0]).model_dump(mode="json")


def as_of_a_card(events: list[dict[str, Any]], kernels: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    """The device's tasks as msprof writes them: the stream as thread, times as text, `kernels` for each operator."""
    made: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "args": {"name": "Ascend Hardware"}}
    ]
    for event in events:
        if event.get("cat") != "task":
            continue
        names = kernels(event["name"])
        for at, name in enumerate(names):
            start, each = event["ts"] + at * event["dur"] / len(names), event["dur"] / len(names)
            said = {"Task Type": "AI_CORE" if name.startswith("aclnn") else "EVENT_WAIT", "Stream Id": 3, "Task Id": at}
            made.append({"ph": "X", "name": name, "pid": 7, "tid": 3, "ts": f"{start:.3f}", "dur": each, "args": said})
    return made


def test_tasks_of_a_profilers_trace_find_their_calls(
    recorded: tuple[Path, Path, dict[str, int]], tmp_path: Path
) -> None:
    own = tasks_of(read(recorded[0]))

    def kernels(name: str) -> list[str]:
        if not name.startswith("aclnn"):
            return ["EVENT_WAIT"]
        return (
            [f"{name}_Cast_Cast", f"{name}_{name.removeprefix('aclnn')}_1"]
            if name == "aclnnMatmul"
            else [f"{name}_X_Y"]
        )

    file = tmp_path / "trace_view.json"
    file.write_text(json.dumps(as_of_a_card(read(recorded[0]), kernels)))
    graph = bundle.open(recorded[1]).graph()
    found = join(tasks_of(read(file)), graph)
    told = [(operator(task.name), task.said["node"], task.said.get("source")) for task in found if "node" in task.said]
    expected = [
        (task.name, task.said["node"], task.said.get("source"))
        for task in own
        if "node" in task.said
        for _ in kernels(task.name)
    ]
    assert told == expected and told
    assert cli.main(["trace", str(file), "--bundle", str(recorded[1])]) == 0
    other = [task for task in tasks_of(read(file)) if "Swi" not in task.name]
    with pytest.raises(TraceError, match="no replay of"):
        join(other, graph)
