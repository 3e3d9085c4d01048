"""What a user is told about a call of their model names the module, the line, and what to do next: every place in the
sources that raises or warns is either provoked here, in tests/serving/test_places.py, or says nothing about a call."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.aot_compile import AOTCompiledFunction
from torch._dynamo.exc import BackendCompilerFailed

import npu_compiler.passes.pattern as pattern
from npu_compiler import Pass, Rule
from npu_compiler.backend import AscendBackend, compile_fx, load_fx
from npu_compiler.errors import (
    CaptureBudgetWarning,
    CaptureError,
    NpuCompilerError,
    StoredProgramError,
    TrainingWarning,
)
from npu_compiler.graph.device import Device
from npu_compiler.graph.serialized import NotStorable, dumps
from npu_compiler.graph.source import where
from npu_compiler.passes import expert_communication
from npu_compiler.passes.record import PassRecord
from npu_compiler.plan import agreement
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.happens_before import verify
from npu_compiler.plan.schedule import StreamPlan, place
from tests.compiler.message_sites import sites

COMPILER = (
    *(
        "npu_compiler/lowering",
        "npu_compiler/portable.py",
        "npu_compiler/backend.py",
        "npu_compiler/dumps.py",
        "npu_compiler/cache.py",
        "npu_compiler/aclgraph",
    ),
    *("npu_compiler/plan", "npu_compiler/graph", "npu_compiler/facts", "passes", "fusion_kernels"),
)
NO_CALL = {
    "fusion_kernels/operator.py:provider": "runs inside of a program, whose caller names the call (graph/running.py)",
    "npu_compiler/backend.py:checked_options": "an option",
    "npu_compiler/aclgraph/buckets.py:buckets": "arguments of a function that chooses sizes",
    "npu_compiler/aclgraph/capture.py:_abandon": "a second error, noted on the first, which names the call",
    "npu_compiler/aclgraph/npugraph_ex.py:serve": "an option",
    "npu_compiler/aclgraph/watch_output.py:_new_folder": "an option",
    "npu_compiler/dumps.py:bundle_of": "an option",
    "npu_compiler/dumps.py:open_graph": "an option",
    "npu_compiler/facts/domain.py:__post_init__": "assumptions that a caller of the engine made",
    "npu_compiler/facts/domain.py:congruent": "assumptions that a caller of the engine made",
    "npu_compiler/facts/emit.py:_emit": "raised in a rule, which is blamed with its place (passes/rewrite.py:_blamed)",
    "npu_compiler/graph/build.py:call": "raised in a rule, which is blamed with its place (passes/rewrite.py:_blamed)",
    "npu_compiler/graph/content.py:_object": "an option: the content of a user's rule",
    **dict.fromkeys(
        (
            f"npu_compiler/graph/serialized.py:{name}"
            for name in ("_argument", "_constant", "_target", "_value", "call", "dumps")
        ),
        "what the report says of a program that is not stored; it has the place (a test below)",
    ),
    "npu_compiler/cache.py:_target": "what the report says of a program that is not stored; graph_parts adds the place",
    "npu_compiler/lowering/floats.py:specialize_module_floats": "has Dynamo trace again; nobody sees it",
    "npu_compiler/plan/amounts.py:evaluate": "sizes that a caller of the memory plan gave",
    "npu_compiler/plan/agreement.py:compare": "an input, by its name, that differs between ranks",
    "passes/common.py:_frozen": "caught where it is called",
    "passes/matching.py:_match": "the definition of a rule",
    "passes/pipeline.py:selected": "an option",
    "passes/record.py:__post_init__": "the definition of a pass",
    "passes/record.py:fire": "ends a pass early; caught where it is called",
    "passes/replacements.py:_node": "the definition of a rule",
    "passes/replacements.py:arguments": "the definition of a rule",
    "passes/replacements.py:read": "the definition of a rule",
    "passes/rewrite.py:__post_init__": "the definition of a rule",
    **dict.fromkeys(
        [
            f"passes/token_drop.py:{name}"
            for name in ("layer_of", "_check_settings", "_check_placement", "_between", "_sum_behind")
        ],
        "caught where it is called",
    ),
    **dict.fromkeys(
        [f"passes/shared_expert_rows.py:{name}" for name in ("_shared", "_read_by", "_check_by_row")],
        "caught where it is called",
    ),
    "passes/users.py:_imported": "an option",
    "passes/users.py:_resolved": "an option",
    "passes/users.py:passes_of": "an option",
    "passes/users.py:placed": "an option",
}
"""Those that say nothing about a call of a model, and what they are about."""
Said = Callable[[], str]
PROVOKED: list[tuple[str, str, Said]] = []
"""Where it is said, the model's line that it has to name, and what makes it be said."""


def says(site: str, line: str) -> Callable[[Said], Said]:
    def add(said: Said) -> Said:
        PROVOKED.append((site, line, said))
        return said

    return add


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.held = torch.ones(4)  # no buffer: it stays in host memory

    def forward(self, x: Tensor, kind: str) -> Any:
        x = x * self.scale
        if kind == "mixes":
            return torch.relu(x), self.held * 2
        if kind == "counts":
            return x.nonzero()
        if kind == "views":
            return x, self.scale[1:]
        if kind == "draws":
            x = x + torch.rand_like(x)
        if kind == "leaves":
            return x.cpu() * 2
        if kind in ("syncs", "fails"):
            x = getattr(torch.ops.places_test, kind)(x)
        if kind == "two":
            left, right = x.sin(), x.cos()
            left, right = left.exp(), right.exp()
            return left + right, left.sqrt()
        return torch.relu(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, kind: str = "") -> Any:
        return self.block(x, kind)


def compiled(**options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(Model().npu(), backend=AscendBackend(), dynamic=False, options=options)


def rows() -> Tensor:
    return torch.ones(2, 4).npu()


def error_of(run: Callable[[], Any], kind: type[BaseException] = BackendCompilerFailed) -> str:
    """What an error says, its notes included, which Python prints below it."""
    with torch.inference_mode(), pytest.raises(kind) as caught:
        run()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def warning_of(run: Callable[[], Any], kind: type[Warning]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    (found,) = [entry for entry in caught if entry.category is kind]
    return str(found.message)


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Operators that look harmless when they are traced."""
    with torch.library._scoped_library("places_test", "DEF") as library:

        def syncs(x: Tensor) -> Tensor:
            torch.npu.current_stream().synchronize()
            return x + 1

        def fails(x: Tensor) -> Tensor:
            raise ValueError("no such row")

        for function in (syncs, fails):
            library.define(f"{function.__name__}(Tensor x) -> Tensor")
            library.impl(function.__name__, function, "CompositeExplicitAutograd")
            library.impl(function.__name__, torch.empty_like, "Meta")
        yield


# -- devices, captures, replays ----------------------------------------------------------------------------------------


@says("npu_compiler/aclgraph/inputs.py:_refuse_mixed", "return torch.relu(x), self.held * 2")
def tensors_of_several_devices() -> str:
    return error_of(lambda: compiled()(rows(), "mixes"))


@says("npu_compiler/aclgraph/capture.py:refuse_uncapturable", "return x.cpu() * 2")
def a_copy_to_the_host() -> str:
    return error_of(lambda: compiled()(rows(), "leaves"))


@says("npu_compiler/aclgraph/capture.py:_capture", "x = getattr(torch.ops.places_test, kind)(x)")
def an_operator_that_waits_in_a_capture() -> str:
    return error_of(lambda: compiled()(rows(), "syncs"), CaptureError)


@says("npu_compiler/aclgraph/outputs.py:refuse_stale", "return torch.relu(x)")
def an_output_that_is_in_use() -> str:
    run = compiled(clone_outputs=False)
    with torch.inference_mode():
        kept = [run(rows()) for _ in range(2)][-1]
    assert kept.shape == (2, 4)
    return error_of(lambda: run(rows()), NpuCompilerError)


@says("npu_compiler/aclgraph/replay.py:_refuse", "x = x * self.scale")
def a_budget_that_is_spent() -> str:
    with torch.inference_mode():
        return warning_of(lambda: compiled(capture_budget_seconds=1e-9)(rows()), CaptureBudgetWarning)


@says("npu_compiler/lowering/functional.py:forward", "x = x * self.scale")
def gradients() -> str:
    with torch.enable_grad():
        return warning_of(lambda: compiled()(rows()).sum().backward(), TrainingWarning)


# -- an operator that fails when it runs -------------------------------------------------------------------------------


@says("npu_compiler/graph/running.py:note", "x = getattr(torch.ops.places_test, kind)(x)")
def an_operator_that_fails() -> str:
    return error_of(lambda: compiled()(rows(), "fails"), ValueError)


@says("npu_compiler/graph/running.py:note", "x = getattr(torch.ops.places_test, kind)(x)")
def an_operator_that_fails_in_vllm() -> str:
    """vLLM compiles by compile_fx, and calls what comes out."""

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_fx(graph, inputs)

    torch._dynamo.reset()
    run = torch.compile(Model().npu(), backend=backend)
    return error_of(lambda: run(rows(), "fails"), ValueError)


@says("npu_compiler/graph/running.py:note", "x = getattr(torch.ops.places_test, kind)(x)")
def an_operator_that_fails_in_training() -> str:
    torch._dynamo.reset()
    run = torch.compile(Model().npu(), backend=AscendBackend())
    with torch.enable_grad(), warnings.catch_warnings(), pytest.raises(ValueError, match="no such row") as caught:
        warnings.simplefilter("ignore", TrainingWarning)
        run(rows(), "fails")
    return "\n".join(caught.value.__notes__)


# -- passes and rules --------------------------------------------------------------------------------------------------


def drop_draws(module: fx.GraphModule, record: PassRecord) -> None:
    for node in list(module.graph.nodes):
        if "rand" in str(node.target):
            node.replace_all_uses_with(module.graph.find_nodes(op="placeholder")[0])
            module.graph.erase_node(node)


def write_input(module: fx.GraphModule, record: PassRecord) -> None:
    add = next(node for node in module.graph.nodes if "mul" in str(node.target))
    with module.graph.inserting_after(add):
        made = module.graph.call_function(torch.ops.aten.zero_.default, (add.args[0],))
    made.meta = {**add.meta, "val": add.args[0].meta["val"]}


def wrong_shape(module: fx.GraphModule, record: PassRecord) -> None:
    (node,) = (node for node in module.graph.nodes if "relu" in str(node.target))
    node.meta["val"] = node.meta["val"].sum(-1)


def wrong_order(module: fx.GraphModule, record: PassRecord) -> None:
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    calls[-1].append(calls[0])


def fails(module: fx.GraphModule, record: PassRecord) -> None:
    raise KeyError("val")


def broken_by(wrong: Callable[..., None], kind: str = "", check: bool = True) -> str:
    run = compiled(check=check, passes=[Pass("wrong", "any", wrong, after="noop")])
    return error_of(lambda: run(rows(), kind))


says("npu_compiler/graph/spec.py:after", "x = x + torch.rand_like(x)")(lambda: broken_by(drop_draws, "draws"))
says("npu_compiler/graph/spec.py:after", "x = x * self.scale")(lambda: broken_by(write_input))
says("npu_compiler/graph/spec.py:_check_value", "return torch.relu(x)")(lambda: broken_by(wrong_shape))
says("npu_compiler/graph/spec.py:lint", "return torch.relu(x)")(lambda: broken_by(wrong_order, check=False))
says("passes/pipeline.py:_blamed", "x = x * self.scale")(lambda: broken_by(fails))


def broken_rule(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "pattern": pattern.Call("aten.relu.default", pattern.Any("x")),
        "replacement": lambda build, match: build(torch.ops.aten.clamp_min.default, match.bindings["x"], 0),
        "reference": torch.relu,
        "example": lambda dtype: (torch.randn(2, dtype=dtype),),
    }
    return error_of(lambda: compiled(rules=[Rule("own", **(fields | changes))])(rows()))


RELU = "return torch.relu(x)"
says("passes/rewrite.py:_blamed", RELU)(lambda: broken_rule(legal=lambda match: match.bindings["y"]))
says("passes/rewrite.py:_blamed", RELU)(
    lambda: broken_rule(replacement=None, operator="aten::mm", operands=lambda match: (match.bindings["x"],))
)
says("passes/rewrite.py:_legality", RELU)(lambda: broken_rule(legal=lambda match: True))
says("passes/rewrite.py:_replacement", RELU)(lambda: broken_rule(replacement=lambda build, match: "x"))


# -- plans and stored programs -----------------------------------------------------------------------------------------


def program(kind: str) -> fx.Graph:
    """The model's program, as it is captured."""
    graphs: list[fx.Graph] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = compile_fx(graph, inputs)
        assert found.graph is not None
        graphs.append(found.graph.graph)
        return found

    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(Model().npu(), backend=backend)(rows(), kind)
    (graph,) = graphs
    return graph


def wrong_plan(change: Callable[[fx.Graph, StreamPlan], StreamPlan]) -> str:
    graph = program("two")
    plan = place(Dependencies.of(graph), {}, 2, Device(event=0.0))
    assert plan.streams == 2
    return error_of(lambda: verify(graph, change(graph, plan)), NpuCompilerError)


def without_waits(graph: fx.Graph, plan: StreamPlan) -> StreamPlan:
    return dataclasses.replace(
        plan, steps=tuple(dataclasses.replace(step, waits=step.waits[:1] if step.stream else ()) for step in plan.steps)
    )


def unjoined(graph: fx.Graph, plan: StreamPlan) -> StreamPlan:
    """Nothing on the main stream waits for the side stream, and nothing there reads what it makes."""
    last = plan.steps[-1]
    steps = tuple(dataclasses.replace(step, stream=0, waits=()) for step in plan.steps[:-1])
    return dataclasses.replace(plan, steps=(*steps, dataclasses.replace(last, stream=1, waits=(0,))), joins=())


def let_go_early(graph: fx.Graph, plan: StreamPlan) -> StreamPlan:
    """A value of the side stream that the main one reads is let go at once."""
    stream = {step.node: step.stream for step in plan.steps}
    reader = next(node for node in stream if any(stream.get(one, 0) != stream[node] for one in node.all_input_nodes))
    made = next(node for node in reader.all_input_nodes if stream.get(node, 0) != stream[reader])
    others = {node: tuple(one for one in gone if one is not made) for node, gone in plan.releases.items()}
    return dataclasses.replace(plan, releases={**others, reader: (*others.get(reader, ()), made)})


says("npu_compiler/plan/happens_before.py:_race", "return left + right, left.sqrt()")(lambda: wrong_plan(without_waits))
says("npu_compiler/plan/happens_before.py:_fail", "return left + right, left.sqrt()")(lambda: wrong_plan(unjoined))
says("npu_compiler/plan/happens_before.py:_early", "x = x * self.scale")(lambda: wrong_plan(let_go_early))


@says("npu_compiler/plan/agreement.py:_same_plan", "x = x * self.scale")
def ranks_that_planned_different_collectives() -> str:
    (first, *_) = (node for node in program("two").nodes if node.op == "call_function")
    ours = agreement.Planned(("all_reduce float32 [2, 4]",), (where(first),))
    return error_of(lambda: agreement._same_plan("tp:0", ours, agreement.Planned(), 1), NpuCompilerError)


@says("passes/expert_communication.py:_refuse_what_was_asked", "x = x * self.scale")
def a_communication_of_experts_that_can_not_be_used() -> str:
    (first, *_) = (node for node in program("two").nodes if node.op == "call_function")
    refused = expert_communication._refuse_what_was_asked
    return error_of(lambda: refused("mc2", first, "no operator"), NpuCompilerError)


def ahead_of_time(*arguments: Any) -> AOTCompiledFunction:
    torch._dynamo.reset()
    model = torch.compile(Model().npu(), backend="ascend", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        return model.forward.aot_compile((arguments, {}))


@says("npu_compiler/portable.py:serialize_compile_artifacts", "x = x * self.scale")
def a_program_that_can_not_be_written() -> str:
    function = ahead_of_time(rows(), "views")
    return error_of(lambda: function.serialize(function), StoredProgramError)


@says("npu_compiler/portable.py:deserialize_compile_artifacts", "x = x * self.scale")
def a_program_of_other_sources() -> str:
    function = ahead_of_time(rows())
    portable = function._artifacts.compiled_fn
    other = pickle.loads(portable.serialize_compile_artifacts(portable))
    data = pickle.dumps(dataclasses.replace(other, made_by={**other.made_by, "sources": "others"}))
    return error_of(lambda: portable.deserialize_compile_artifacts(data), StoredProgramError)


@says("npu_compiler/backend.py:_read", "x = x * self.scale")
def a_stored_program_of_another_version() -> str:
    torch._dynamo.reset()
    run = torch.compile(Model().npu(), backend=lambda graph, inputs: load_fx(b"from elsewhere", graph, inputs))
    return error_of(lambda: run(rows()))


# -- the table ---------------------------------------------------------------------------------------------------------


def names_the_place(text: str, line: str) -> None:
    """The module's path, the file with the number of the line, the line, and what to do."""
    found = re.search(rf"block at {re.escape(__file__)}:(\d+): {re.escape(line)}", text)
    assert found, text
    assert Path(__file__).read_text().splitlines()[int(found[1]) - 1].strip() == line
    assert re.search(r"fix: \w|For inference call it|Raise the option", text), text


@pytest.mark.parametrize(
    ("site", "line", "said"), [pytest.param(*one, id=one[0].rpartition("/")[2]) for one in PROVOKED]
)
def test_a_message_names_the_place(site: str, line: str, said: Said) -> None:
    names_the_place(said(), line)


def test_every_message_is_in_the_table() -> None:
    found, provoked = sites(*COMPILER), {site for site, _, _ in PROVOKED}
    assert provoked.isdisjoint(NO_CALL)
    assert found - provoked - NO_CALL.keys() == set(), "provoke it here, or say what else it is about in NO_CALL"
    assert (provoked | NO_CALL.keys()) - found == set(), "these are gone"


def test_a_program_that_is_not_stored_says_where_the_reason_is() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        counting = program("counts")
    with pytest.raises(NotStorable) as caught:
        dumps(fx.GraphModule(nn.Module(), counting))
    assert re.search(
        rf"found at run time \(block at {re.escape(__file__)}:\d+: return x\.nonzero\(\)\)", str(caught.value)
    )


def test_reports_and_logs_name_the_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "npu_compiler"), torch.inference_mode():
        run = compiled()
        for _ in range(2):
            run(rows())
    compiling, capturing = (entry.getMessage() for entry in caplog.records if entry.levelno == logging.INFO)
    for text, what in ((compiling, "compiled graph_0"), (capturing, "captured static")):
        assert what in text and f"block at {__file__}:" in text and "x = x * self.scale" in text
