"""What leaves a module or a line is noted right behind the call that computes it, and stays there to be noted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx, nn

from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.fusion_kernels.watched import operator
from npu_compiler.graph.source import place
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.watch import NAME, absent, concerns, pass_of
from tests.passes.lowered import apply, lowered


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return nn.functional.silu(left) * right


class Model(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16), "gate": Gate()}) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["gate"](layer["up"](x)) + x
        return x


def watched(places: list[str], count: int = 2) -> tuple[list[tuple[str, str, str]], list[str]]:
    """What is noted of a model of so many layers: operator, place and kind of each; and the reasons of what is not."""
    module = lowered(Model(count), torch.rand(4, 8)).graph
    entry = pass_of(places)
    assert entry is not None
    record = apply(entry, module)
    found = []
    for node in module.graph.find_nodes(op="call_function", target=operator()):
        said = json.loads(node.args[1])
        assert node.prev is node.args[0] or node.prev.target is operator()
        assert said["node"] == node.args[0].name
        found.append((str(node.args[0].target), said["place"], said["what"]))
    assert len(record.fired) == len(found)
    return found, [refused.reason for refused in record.refused]


def test_what_leaves_a_module() -> None:
    ((call, place, what),), refused = watched(["layers.1.gate:stats"])
    assert (call, what, refused) == ("aten.mul.Tensor", "stats", [])
    assert place.startswith("layers.1.gate at ") and "silu(left) * right" in place


def test_a_method_may_call_its_module_as_it_likes() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Gate() for _ in range(2))

        def forward(s, x: Tensor) -> Tensor:
            return s.layers[1](s.layers[0](x))

    model = Other()
    for called in (model, lambda x: model(x), {"of": model}["of"].forward):
        module = lowered(called, torch.rand(4, 8)).graph
        found = [place(node).module for node in module.graph.nodes if node.op == "call_function"]
        assert set(found) == {"layers.0", "layers.1"}
        assert concerns(module.graph, ["layers.1:stats"]) and not concerns(module.graph, ["layers.2:stats"])


def test_places_with_wildcards_and_lines() -> None:
    assert [place.split(" at ")[0] for _, place, _ in watched(["layers.*.gate:values"])[0]] == [
        "layers.0.gate",
        "layers.1.gate",
    ]
    line = Gate.forward.__code__.co_firstlineno + 2
    for file in ("test_watch.py", "passes/test_watch.py", __file__):
        assert [call for call, *_ in watched([f"{file}:{line}:nan"])[0]] == ["aten.mul.Tensor"] * 2
    calls = [call for call, *_ in watched([f"test_watch.py:{line - 1}:stats"])[0]]
    assert len(calls) == 4  # both halves, in each layer


def test_what_is_not_there_is_told_with_the_nearest() -> None:
    nothing = "nothing is computed there, so nothing is noted; there is "
    found, (reason,) = watched(["layers.1.gat:stats"])
    assert (found, reason) == ([], f"{nothing}'layers.1.gate', 'layers.0.gate', 'layers.1.up'")
    line = Gate.forward.__code__.co_firstlineno + 2
    (reason,) = watched([f"passes/test_watch.py:{line + 1}:nan"])[1]
    assert reason.startswith(f"{nothing}'test_watch.py:{line}', 'test_watch.py:{line - 1}', ")
    assert watched(["elsewhere.py:3:stats"])[1][0].startswith(f"{nothing}'test_watch.py:")
    graph = lowered(Model(), torch.rand(4, 8)).graph.graph
    assert concerns(graph, ["layers.1.gate:stats"]) and concerns(graph, ["*:nan"])
    assert not concerns(graph, ["layers.7.gate:stats"]) and not concerns(graph, [])


def test_what_one_piece_of_a_model_has_is_there() -> None:
    def records(*places: str) -> list[PassRecord]:
        entry = pass_of([f"{place}:nan" for place in places])
        assert entry is not None
        return [apply(entry, lowered(Model(1), torch.rand(4, 8)).graph)]

    one, other = records("layers.0.gate", "layers.0.gat"), records("layers.0.up", "layers.0.gat", "layers.0.gate")
    (told,) = absent([one, other])
    assert told.startswith("'layers.0.gat': nothing is computed there")
    assert not list(absent([one, records("layers.0.gate")]))
    assert not list(absent([[], []]))


def test_a_program_without_modules() -> None:
    """As a graph that vLLM has read from its cache: lines are known."""
    module = lowered(Model(1), torch.rand(4, 8)).graph
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    entry = pass_of(["layers.0.gate:nan"])
    assert entry is not None
    (told,) = absent([[apply(entry, module)]])
    assert told.startswith("'layers.0.gate': no call of this program says which module it is in")
    assert "there is 'test_watch.py:" in told


def test_a_module_whose_values_nobody_uses() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(torch.ops.aten.sin.default, (x,))
    call.meta = {"val": torch.ones(2), "nn_module_stack": {"unused": ("unused", nn.Module)}}
    graph.output((x,))
    entry = pass_of(["unused:nan"])
    assert entry is not None
    assert entry.run is not None
    record = PassRecord(NAME)
    entry.run(fx.GraphModule(nn.Module(), graph), record)
    assert record.refused[0].reason == "no value that is computed there is used elsewhere, so nothing of it is noted"


def fusions(places: list[str], count: int = 2) -> tuple[list[str], list[str]]:
    """The places at which gates were fused, and why others were not."""
    module = lowered(Model(count), torch.rand(4, 8), inference=True).graph
    records = pipeline.run(module, Options(watch=tuple(places), check=True))
    fired = [fire.place.split(" at ")[0] for record in records if record.name == "swiglu" for fire in record.fired]
    return fired, [refused.reason for record in records if record.name == "swiglu" for refused in record.refused]


def test_a_watched_value_is_not_fused_away_and_the_report_says_why() -> None:
    assert fusions(["layers.1.gate:stats"]) == (["layers.0.gate", "layers.1.gate"], [])

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = Inner()

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=-1)
            return self.act(left) * right

    for places, count in (([], 1), (["act:stats"], 0)):
        module = lowered(Outer(), torch.rand(4, 8), inference=True).graph
        records = pipeline.run(module, Options(watch=tuple(places), check=True))
        (record,) = [record for record in records if record.name == "swiglu"]
        assert len(record.fired) == count
        if places:
            assert any("is also used by watched" in refused.reason for refused in record.refused)


def test_equal_layers_stay_equal_and_a_watched_one_is_its_own() -> None:
    module = lowered(Model(12), torch.rand(4, 8), inference=True).graph
    pipeline.run(module, Options(watch=("layers.2.gate:stats",), check=True))
    (node,) = module.graph.find_nodes(op="call_function", target=operator())
    assert json.loads(node.args[1])["place"].startswith("layers.2.gate")
    module = lowered(Model(12), torch.rand(4, 8), inference=True).graph
    records = pipeline.run(module, Options(watch=("layers.*.gate:stats",), check=True))
    assert [fire.rule for record in records if record.name == "layers_once" for fire in record.fired]
    nodes = module.graph.find_nodes(op="call_function", target=operator())
    places = [json.loads(node.args[1])["place"].split(" at ")[0] for node in nodes]
    assert places == [f"layers.{layer}.gate" for layer in range(12)]


@pytest.mark.parametrize("entry", ["gate", "gate:all", ":stats", "", "*:values", "*:stats"])
def test_wrong_entries_are_refused(entry: str) -> None:
    with pytest.raises(OptionError, match="watch names"):
        Options.of({"watch": [entry]})


def test_the_environment_is_asked_where_the_option_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_COMPILER_WATCH", "layers.1:stats,model.py:3:nan")
    assert Options.of({}).watch == ("layers.1:stats", "model.py:3:nan")
    assert Options.of({"watch": ["*:nan"]}).watch == ("*:nan",)
    assert pass_of(("*:nan",)) is None and NAME == "watch"
