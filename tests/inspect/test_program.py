"""Programs as data, as Python and as graphs again."""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, fx

from npu_compiler.inspect.from_graph import program_of
from npu_compiler.inspect.program import Program
from npu_compiler.inspect.python_text import CONSTANTS, python_text
from npu_compiler.inspect.to_graph import graph_of
from tests.inspect.stages import Stage, qwen3_stages, stages_of


def read_back(program: Program) -> Program:
    """What a reader of the written data gets."""
    return Program.model_validate_json(program.model_dump_json(exclude_defaults=True))


def printed(stage: Stage, folder: Path) -> types.ModuleType:
    """The stage's printed Python, as the module that it is."""
    folder.mkdir(exist_ok=True)
    if stage.constants:
        save_file(stage.constants, folder / CONSTANTS)
    file = folder / f"{stage.name}.py"
    file.write_text(python_text(read_back(stage.program), stage.name))
    module = types.ModuleType(stage.name)
    module.__file__ = str(file)
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    return module


def fresh(inputs: list[Any]) -> list[Any]:
    return [item.clone() if isinstance(item, Tensor) else item for item in inputs]


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def check(stage: Stage, folder: Path) -> fx.GraphModule:
    """Text, rebuilt graph and graph return, and leave in their inputs, the same. Returns the rebuilt graph."""
    module = printed(stage, folder)
    rebuilt = graph_of(read_back(stage.program), stage.constants)
    inputs = module.inputs()
    runs = [(run, fresh(inputs)) for run in (stage.graph, module.program, rebuilt)]
    with torch.no_grad():
        (expected, left), *others = [(run(*given), given) for run, given in runs]
    for found, given in others:
        same(list(found), list(expected))
        same(given, left)
    return rebuilt


def test_every_stage_of_a_qwen3_runs_as_printed_and_rebuilt(tmp_path: Path) -> None:
    stages = qwen3_stages()
    names = [stage.name for stage in stages]
    assert {"lowered", "shortened", "qk_norm_rope", "swiglu", "reinplace", "layers_once"} <= set(names)
    texts: dict[str, int] = {}
    for index, stage in enumerate(stages):
        text = python_text(stage.program, "")
        if texts.setdefault(text, index) == index:
            rebuilt = check(stage, tmp_path / str(index))
            assert program_of(rebuilt.graph) == stage.program
    assert len(texts) >= 7
    assert "torch.ops.npu_fused.add_rms_norm" in text
    assert "model.layers.5" in text


def mutating(x: Tensor, cache: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    cache.index_copy_(0, rows, x * 2)
    table = torch.tensor([1.0, 2.0, 4.0, 8.0], device=x.device)
    left, right = x.split([2, 2], dim=1)
    return (left + right).softmax(-1) @ cache[:2, :2], x * table + float("-inf")


@pytest.mark.parametrize("dynamic", [False, True])
def test_mutation_constants_and_symbols(dynamic: bool, tmp_path: Path) -> None:
    x, cache, rows = torch.rand(3, 4).npu(), torch.zeros(9, 4).npu(), torch.arange(3).npu()
    stages = stages_of(mutating, x, cache, rows, dynamic=dynamic)
    assert stages[-1].constants
    assert any(call.writes for call in stages[-1].program.calls)
    assert bool(stages[-1].program.sizes) == dynamic
    for index, stage in enumerate(stages):
        check(stage, tmp_path / str(index))


def test_a_symbol_follows_its_input(tmp_path: Path) -> None:
    def grow(x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0] * 2, x.shape[1]) + torch.cat([x, x])

    lowered, *_ = stages_of(grow, torch.rand(3, 4).npu(), dynamic=True)
    module = printed(lowered, tmp_path)
    size = next(name for name, value in lowered.program.sizes.items() if value == 3)
    inputs = {call.name: made for call, made in zip(lowered.program.inputs, module.inputs(), strict=True)}
    for call in lowered.program.inputs:
        if call.values[0].__dict__.get("size") == size:
            inputs[call.name] = 5
        elif isinstance(inputs[call.name], Tensor):
            inputs[call.name] = torch.rand(5, 4).npu()
    (found,) = module.program(*inputs.values())
    assert found.shape == (10, 4)


def test_a_functionalized_operator_is_printed_with_what_it_writes(tmp_path: Path) -> None:
    with torch.library._scoped_library("inspected", "DEF") as library:
        library.define("scale_(Tensor(a!) x, float by) -> ()")
        library.impl("scale_", lambda x, by: [x.mul_(by)].clear(), "CompositeExplicitAutograd")
        library.impl("scale_", lambda x, by: None, "Meta")

        def scaled(x: Tensor) -> Tensor:
            y = x + 1
            torch.ops.inspected.scale_(y, 3.0)
            return y

        stages = stages_of(scaled, torch.rand(4).npu())
        text = python_text(stages[0].program, "")
        assert "torch.ops.higher_order.auto_functionalized_v2(torch.ops.inspected.scale_.default" in text
        assert "inspected.scale_.default(" in python_text(stages[-1].program, "")
        for index, stage in enumerate(stages):
            check(stage, tmp_path / str(index))


def test_aliased_inputs_share_memory(tmp_path: Path) -> None:
    base = torch.rand(12).npu()
    lowered, *_ = stages_of(lambda x, y: x.sum() + y, base[:4], base[2:])
    inputs = printed(lowered, tmp_path).inputs()
    assert len({item.untyped_storage().data_ptr() for item in inputs}) == 1
    assert [tuple(item.shape) for item in inputs] == [(4,), (10,)]


@functools.cache
def written() -> str:
    lowered, *_ = stages_of(lambda x: (x + 1).to(torch.float16).sum(0), torch.rand(3, 4).npu(), dynamic=True)
    return lowered.program.model_dump_json(exclude_defaults=True)


def a_program() -> dict[str, Any]:
    """The written data of a small program."""
    return json.loads(written())


EVIL = "(__import__('os').system('true'))"


def spoiled(change: str) -> dict[str, Any]:
    data = a_program()
    call = next(call for call in data["calls"] if call["op"] == "call_function" and "args" in call)
    tensor = next(entry["values"][0] for entry in data["calls"] if "shape" in entry["values"][0])
    match change:
        case "name":
            call["name"] = f"a = {EVIL}; b"
        case "dunder":
            call["name"] = "__class__"
        case "keyword":
            call["name"] = "import"
        case "target":
            call["target"] = f"aten.add.Tensor(1, 2) or {EVIL} or x"
        case "argument name":
            call["kwargs"] = {f"a={EVIL}, b": 1}
        case "size":
            tensor["shape"] = [EVIL, 4]
        case "size call":
            tensor["shape"] = ["exec(s0)", 4]
        case "size attribute":
            tensor["shape"] = ["s0.__class__", 4]
        case "symbol":
            data["sizes"] = {f"s0 = {EVIL}": 3}
        case "dtype":
            tensor["dtype"] = f"torch.float32 or {EVIL}"
        case "device":
            tensor["device"] = "cpu') or print('"
        case "named":
            call["args"] = [{"kind": "dtype", "text": f"torch.float32, {EVIL}"}]
        case "operator":
            call["args"] = [{"kind": "operator", "text": f"aten.add.Tensor, {EVIL}"}]
        case "unknown reader":
            call["args"] = [{"name": "nobody"}]
        case "extra":
            call["run"] = "it"
        case "extra place":
            call["place"] = {"run": "it"}
        case "two outputs":
            data["calls"].append({**data["calls"][-1], "name": "again"})
    return data


@pytest.mark.parametrize(
    "change",
    [
        *("name", "dunder", "keyword", "target", "argument name", "size", "size call", "size attribute", "symbol"),
        *("dtype", "device", "named", "operator", "unknown reader", "extra", "extra place", "two outputs"),
    ],
)
def test_data_that_is_no_program_is_refused(change: str) -> None:
    Program.model_validate(a_program())
    with pytest.raises(ValidationError):
        Program.model_validate(spoiled(change))


def test_texts_of_a_stranger_stay_texts(tmp_path: Path) -> None:
    """What is not a name is printed as a text or a comment, and a function that is no operator is not called."""
    data = a_program()
    mark = tmp_path / "ran"
    evil = f'x"""\n\u2028import os; open({str(mark)!r}, "w")\n"""\\'
    for call in data["calls"]:
        call["place"] = {"module": evil, "file": evil, "line": 1, "function": evil, "text": evil}
        call["made_by"] = evil
    call = next(call for call in data["calls"] if call["op"] == "call_function")
    call["target"] = "os.system"
    call["args"] = [f"touch {mark}", {"kind": "other", "text": evil}, {"kind": "mapping", "items": [1], "keys": [evil]}]
    text = python_text(Program.model_validate(data), evil)
    module = types.ModuleType("stranger")
    exec(compile(text, "stranger.py", "exec"), module.__dict__)
    with pytest.raises(NotImplementedError, match=r"os\.system is no operator"):
        module.program(*module.inputs())
    assert not mark.exists()
