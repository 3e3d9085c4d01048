"""Bundles made by hand: of any size, with any text, without compiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npu_compiler.graph.source import Place
from npu_compiler.inspect import bundle
from npu_compiler.inspect.bundle import Bundle
from npu_compiler.inspect.contents import Captured, Environment, Graph, Header, Plan, Stage
from npu_compiler.inspect.program import Call, Cost, Items, Program, Result, TensorValue


def tensor(storage: int, *shape: int) -> TensorValue:
    """A contiguous tensor."""
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return TensorValue(dtype="torch.float32", device="npu:0", shape=shape, stride=tuple(stride), storage=storage)


def call(
    name: str, *reads: str, target: str = "aten.add.Tensor", storage: int, micros: float = 2.0, **more: Any
) -> Call:
    """A call on vectors of four that launches something, unless `micros` is 0."""
    cost = Cost(engine="vector", bytes=48, microseconds=micros) if micros else None
    given = {"values": (tensor(storage, 4),), "cost": cost, **more}
    return Call(name=name, op="call_function", target=target, args=tuple(Result(name=read) for read in reads), **given)


def program(*calls: Call, inputs: Sequence[str] = ("x",)) -> Program:
    """These calls behind their inputs; the last one is returned."""
    given = [
        Call(name=name, op="placeholder", target=name, values=(tensor(index, 4),)) for index, name in enumerate(inputs)
    ]
    returned = Items(kind="tuple", items=(Result(name=calls[-1].name),))
    output = Call(name="output", op="output", target="output", args=(returned,))
    return Program(calls=(*given, *calls, output))


def layered(layers: int, calls: int) -> Program:
    """A model of equal layers: each has as many calls, in four modules."""
    made, last = [], "x"
    for layer in range(layers):
        for index in range(calls):
            module = f"model.layers.{layer}.{('norm', 'attention', 'mlp.up', 'mlp.down')[4 * index // calls]}"
            place = Place(module, "/model/layer.py", 10 + index, "forward", f"x = step_{index}(x)")
            name = f"call_{layer}_{index}"
            made.append(call(name, last, "x", storage=len(made) + 1, place=place))
            last = name
    return program(*made)


def written(
    folder: Path,
    stages: Sequence[tuple[Stage, Program]],
    *,
    name: str = "graph_0",
    plan: Plan | None = None,
    captures: Sequence[Captured] = (),
    about: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
) -> Bundle:
    """A bundle with one graph of these stages."""
    place = folder / "rank0" / name
    place.mkdir(parents=True)
    known: dict[str, Any] = {"versions": {"torch": "2.13.0"}, "platform": "Linux", "cann": "host", "device": "Ascend"}
    header = Header(format=1, started=1.0, environment=Environment(**{**known, **(environment or {})}))
    (folder / "rank0" / "bundle.json").write_text(header.model_dump_json())
    graph = Graph(**{"format": 1, "name": name, "started": 1.0, "options": {"capture": "True"}, **(about or {})})
    (place / "graph.json").write_text(graph.model_dump_json())
    lines = []
    for number, (stage, of) in enumerate(stages):
        file = f"{number:02}_stage"
        (place / f"{file}.json").write_text(of.model_dump_json(exclude_defaults=True))
        amount = sum(entry.op == "call_function" for entry in of.calls)
        counts = {"program": file, "calls": amount, "calls_of_all": amount}
        lines.append(stage.model_copy(update=counts).model_dump_json(exclude_defaults=True))
    (place / "stages.jsonl").write_text("\n".join([*lines, ""]))
    if plan is not None:
        (place / "plan.json").write_text(plan.model_dump_json())
    (place / "captures.jsonl").write_text("".join(f"{entry.model_dump_json()}\n" for entry in captures))
    return bundle.open(folder)
