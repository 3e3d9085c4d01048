"""Programs as bytes: what is read is what was written, values and the memory they share included."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.config import Options
from npu_compiler.graph.constants import LARGEST, to_bytes
from npu_compiler.graph.effects import tensors
from npu_compiler.graph.serialized import NotStorable, dumps, loads
from npu_compiler.graph.source import module_paths
from npu_compiler.lowering.functional import Functional
from npu_compiler.passes import pipeline
from tests.compiler.test_layers_once import program
from tests.passes.lowered import lowered

aten = torch.ops.aten


def views_and_writes(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
    """Views of inputs and of results, several results of one call, a write, keyword arguments, a copy of a part."""
    left, right = (x * 2).split([3, 5], dim=-1)
    values, indices = right.contiguous().topk(2, dim=-1)
    cache[1:3] = left.double().sum() * 0.1
    return values.t()[:, ::2].clone(), indices, torch.full_like(left, float("-inf")), cache[:, 1:] + 1


def rewritten(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> Functional:
    """The program behind the passes, whose writes are in place."""
    found = lowered(function, *args, dynamic=dynamic)
    pipeline.run(found.graph, Options())
    return found


def inputs_of(graph: fx.Graph) -> list[Any]:
    return [node.meta["val"] for node in graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_read_is_what_was_written(dynamic: bool) -> None:
    written = rewritten(views_and_writes, torch.rand(4, 8), torch.rand(4, 4), dynamic=dynamic).graph
    read = loads(dumps(written), inputs_of(written.graph))
    assert program(read.graph) == program(written.graph)
    assert [node.name for node in read.graph.nodes] == [node.name for node in written.graph.nodes]
    assert any(" aten.copy_" in line or "_.default" in line for line in program(read.graph)), "nothing is written"
    if not dynamic:
        x, cache = torch.rand(4, 8), torch.rand(4, 4)
        mine, theirs = cache.clone(), cache.clone()
        for got, wanted in zip([*read(x, mine), mine], [*views_and_writes(x, theirs), theirs], strict=True):
            assert torch.equal(got, wanted)


def test_values_are_inferred_for_inputs_that_lie_otherwise() -> None:
    """A reader whose inputs share memory, where the writer's did not, gets the values of its own inputs."""
    graph = rewritten(lambda x, y: (x.t(), y + 1, x @ y), torch.rand(4, 4), torch.rand(4, 4)).graph
    mode = FakeTensorMode(shape_env=ShapeEnv())
    both = mode.from_tensor(torch.rand(4, 4))
    wide = mode.from_tensor(torch.rand(4, 8))[:, :4]
    for inputs in ([both, both], [wide, both]):
        read = loads(dumps(graph), inputs).graph
        for node in read.nodes:
            given = [tensor for source in node.all_input_nodes for tensor in tensors(source)]
            if node.target is aten.t.default:
                (view,) = tensors(node)
                assert view.stride() == given[0].stride()[::-1]
                assert view.untyped_storage()._cdata == given[0].untyped_storage()._cdata


NUMBERS = [
    torch.tensor(0.1),
    torch.tensor([[1.0, -0.0, float("inf")], [float("nan"), 1e-40, -2.5]], dtype=torch.float32),
    torch.tensor([1.0, 3.140625], dtype=torch.bfloat16),
    torch.tensor([[True], [False]]),
    torch.tensor([2**62 + 1, -1]),
    torch.tensor([]),
]


@pytest.mark.parametrize("constant", NUMBERS, ids=lambda constant: f"{constant.dtype} {tuple(constant.shape)}")
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_constants_are_read_as_they_were(constant: Tensor, device: str) -> None:
    numbers, dtype = constant.tolist(), constant.dtype

    def function(x: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=x.device) * x

    x = torch.tensor(1, dtype=dtype, device=device)
    written = rewritten(function, x).graph
    assert written.graph.find_nodes(op="get_attr"), "torch no longer makes constants of numbers"
    read = loads(dumps(written), inputs_of(written.graph))
    assert program(read.graph) == program(written.graph)
    (kept,) = {getattr(read, node.target) for node in read.graph.find_nodes(op="get_attr")}  # type: ignore[arg-type]
    assert kept.dtype == constant.dtype
    assert to_bytes(kept) == to_bytes(constant)
    (found,) = read(x)
    assert to_bytes(found) == to_bytes(constant)


def reading(*constants: Tensor) -> fx.GraphModule:
    """A program that returns constants, each of them twice."""
    graph, root, mode = fx.Graph(), torch.nn.Module(), FakeTensorMode()
    for index, constant in enumerate(constants):
        setattr(root, f"constant{index}", constant)
        fake = mode.from_tensor(constant)
        for _ in range(2):
            graph.get_attr(f"constant{index}").meta["val"] = fake
    graph.output(tuple(graph.nodes))
    return fx.GraphModule(root, graph)


def test_constants_are_limited_together() -> None:
    part = torch.zeros(LARGEST // 2, dtype=torch.uint8)
    written = reading(part, part.clone())
    assert program(loads(dumps(written), []).graph) == program(written.graph)
    with pytest.raises(NotStorable, match=r"it holds the constant constant2; more than 1\.0 MiB of constants"):
        dumps(reading(part, part.clone(), torch.zeros(1)))


def test_module_paths_are_read_as_they_were() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()), torch.nn.Sigmoid())
    written = lowered(model, torch.rand(4)).graph
    read = loads(dumps(written), inputs_of(written.graph))
    paths, found = ([module_paths(node) for node in entry.graph.nodes] for entry in (written, read))
    assert found == paths
    assert [path[-1] for path in found if path] == ["0.0", "0.1", "1"]


def by_hand(target: Any, args: Sequence[Any] = (), constant: bool = False) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mode = FakeTensorMode()
    x.meta["val"] = mode.from_tensor(torch.rand(4))
    node = graph.get_attr("weight") if constant else graph.call_function(target, (x, *args))
    node.meta["val"] = mode.from_tensor(torch.rand(4))
    graph.output((node,))
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.rand(4))
    with _use_lazy_graph_module(True):  # it need not run
        return _make_graph_module(root, graph)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (by_hand(None, constant=True), "it holds the constant weight"),
        (by_hand(lambda x: x), "which has no name"),
        (by_hand(aten.add.Tensor, [frozenset({1})]), "which is no plain data"),
    ],
)
def test_what_no_other_process_knows_is_refused(module: fx.GraphModule, reason: str) -> None:
    with pytest.raises(NotStorable, match=reason):
        dumps(module)


def test_arguments_keep_their_kinds() -> None:
    """1, 1.0 and True are three; operators, dtypes and slices are themselves."""
    given = [1, 1.0, True, None, "1", -0.0, float("inf"), torch.float16, torch.device("cpu"), torch.channels_last]
    given += [slice(None, 3), aten.mm.default, torch.ops.higher_order.cond, {"a": [1, (2,)]}]
    read = loads(dumps(by_hand(operator.getitem, [given])), [FakeTensorMode().from_tensor(torch.rand(4))]).graph
    (node,) = read.find_nodes(op="call_function", target=operator.getitem)
    assert list(map(repr, node.args[1])) == list(map(repr, given))  # type: ignore[arg-type]
    assert node.args[1][-3:-1] == given[-3:-1]  # type: ignore[index]


def test_an_operator_that_is_not_there_is_said() -> None:
    library = torch.library.Library("serialized_test", "FRAGMENT")
    library.define("gone(Tensor x) -> Tensor")
    data = dumps(by_hand(torch.ops.serialized_test.gone.default))
    renamed = data.replace(b"serialized_test.gone", b"serialized_test.lost")
    with pytest.raises(AttributeError, match="lost"):
        loads(renamed, [FakeTensorMode().from_tensor(torch.rand(4))])


def test_equal_layers_are_written_once() -> None:
    """What a further layer adds is its calls, not its lines of code and layouts."""

    def deep(layers: int) -> int:
        def function(x: Tensor) -> Tensor:
            for _ in range(layers):
                x = torch.tanh(x @ x) + 1
            return x

        return len(dumps(lowered(function, torch.rand(4, 4)).graph))

    few, many = deep(2), deep(42)
    assert many < few + 40 * 3 * 100, "100 bytes a call"
