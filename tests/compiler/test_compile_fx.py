"""compile_fx: the road without capture, as vLLM's compiler interface calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from npu_compiler.backend import CompiledGraph, compile_fx, fingerprint
from npu_compiler.inspect import bundle
from npu_compiler.passes import pipeline


def compiled_by(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> CompiledGraph:
    """compile_fx on a copy of dynamo's graph and the fake inputs dynamo has, as vLLM does for a piece of a model."""
    made: list[CompiledGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
        made.append(compile_fx(copy.deepcopy(gm), fakes, **kwargs))
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return made[0]


def test_sizes_are_inputs() -> None:
    """A compiled piece is called with the sizes dynamo passes, and serves other ones than it was traced with."""

    def scaled(x: Tensor) -> Tensor:
        return x.view(-1) * x.shape[0]

    x = torch.rand(4, 3)
    torch._dynamo.mark_dynamic(x, 0)
    piece = compiled_by(scaled, x, dynamic=None)  # type: ignore[arg-type]
    for rows in (4, 7):
        other = torch.rand(rows, 3)
        (result,) = piece(rows, other)
        torch.testing.assert_close(result, scaled(other))


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, y + 1), lambda y: [y, (y * 2,)]])
def test_returned_structure_is_kept(wrap: Callable[[Any], Any]) -> None:
    """A piece that vLLM splits off may return one tensor; dynamo's own graphs return a tuple."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(wrap(graph.call_function(torch.neg, (x,))) if wrap(1) == 1 else nested(graph, x, wrap))
    module = fx.GraphModule({}, graph)
    example = torch.rand(3)
    expected = module(example)
    got = compile_fx(copy.deepcopy(module), [example])(example)
    assert isinstance(got, Tensor) == isinstance(expected, Tensor)
    torch.testing.assert_close(plain(got), plain(expected))


def plain(value: Any) -> Any:
    """Sequences as tuples: a flat one comes back as a list, as from every compiler of torch.compile."""
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def nested(graph: fx.Graph, x: fx.Node, wrap: Callable[[Any], Any]) -> Any:
    """What `wrap` makes of a call, with its arithmetic as calls too."""
    proxy = fx.Proxy(graph.call_function(torch.neg, (x,)))
    return torch.utils._pytree.tree_map(lambda item: item.node, wrap(proxy))


def test_mutating_operator_writes_in_place() -> None:
    """An attention operator writes its output buffer: no clone of it, and nothing of it is dropped as dead code."""
    with torch.library._scoped_library("compile_fx_test", "DEF") as library:
        library.define("attend(Tensor q, Tensor(a!) out, str layer) -> ()")
        seen: list[int] = []

        def attend(q: Tensor, out: Tensor, layer: str) -> None:
            seen.append(out.data_ptr())
            out.copy_(q + 1)

        library.impl("attend", attend, "CompositeExplicitAutograd")
        library.impl("attend", lambda q, out, layer: None, "Meta")

        def layer(q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            torch.ops.compile_fx_test.attend(q, out, "layer.0")
            return out.view(-1)

        q = torch.rand(2, 4)
        piece = compiled_by(layer, q)
        assert piece.graph is not None
        operators = [str(node.target) for node in piece.graph.graph.nodes if node.op == "call_function"]
        assert operators == ["aten.empty_like.default", "compile_fx_test.attend.default", "aten.view.default"]
        (result,) = piece(q)
        torch.testing.assert_close(result, q.view(-1) + 1)
        assert seen[-1] == result.data_ptr()


def test_input_mutation() -> None:
    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache[1:] += x
        return cache * 2

    cache, x = torch.zeros(3, 4), torch.rand(2, 4)
    piece = compiled_by(step, cache.clone(), x)
    for _ in range(2):
        expected = cache.clone()
        want = step(expected, x)
        (got,) = piece(cache, x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(cache, expected)


def test_hooks_see_the_stages_they_are_named_after() -> None:
    stages: dict[str, list[str]] = {}

    def note(stage: str) -> Callable[[fx.Graph], None]:
        def hook(graph: fx.Graph) -> None:
            stages[stage] = [str(node.target) for node in graph.nodes if node.op == "call_function"]

        return hook

    compiled_by(
        lambda x: torch.nn.functional.silu(x[..., :4]) * x[..., 4:],
        torch.rand(2, 8),
        before_lowering=note("before"),
        after_passes=note("after"),
    )
    assert any("silu" in target for target in stages["before"])
    assert stages["after"] == ["npu_fused.swiglu.default"]


def test_hook_may_rewrite() -> None:
    def to_exp(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
            node.target = torch.ops.aten.exp.default

    x = torch.rand(3)
    (result,) = compiled_by(lambda x: x.sin(), x, after_passes=to_exp)(x)
    torch.testing.assert_close(result, x.exp())


def test_fingerprint_follows_what_decides_the_output() -> None:
    assert fingerprint() == fingerprint({})
    assert fingerprint({"disabled_passes": ["swiglu"]}) != fingerprint()
    assert fingerprint({"dump": "somewhere"}) == fingerprint()


def test_passes_can_be_left_out() -> None:
    def gate(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x[..., :4]) * x[..., 4:]

    piece = compiled_by(gate, torch.rand(2, 8), options={"disabled_passes": ["swiglu"]})
    assert piece.graph is not None
    assert "npu_fused" not in str(piece.graph.graph)
    assert "swiglu" not in [record.name for record in piece.records]


def test_dump(tmp_path: Any) -> None:
    compiled_by(lambda x: x + 1, torch.rand(2), options={"dump": str(tmp_path)}, name="piece")
    graph = bundle.open(tmp_path).graph("piece")
    assert [stage.name for stage in graph.stages][:2] == ["lowered", pipeline.PASSES[0].name]
    assert "torch.ops.aten.add.Tensor" in graph.python(graph.stages[0])
    assert graph.captures == ()
