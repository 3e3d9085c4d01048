"""options={"check": True}: a pass that leaves a wrong program is named, with the node and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from npu_compiler import Pass
from npu_compiler.errors import SpecError
from npu_compiler.graph.effects import storage
from npu_compiler.passes.record import PassRecord
from tests.compiler.test_compile_fx import compiled_by

aten = torch.ops.aten


def program(x: Tensor, cache: Tensor) -> Tensor:
    cache.add_(1)
    return torch.dropout((x + 1).view(-1), 0.5, True) + torch.rand_like(x).view(-1)


def first(graph: fx.Graph, target: object) -> fx.Node:
    return graph.find_nodes(op="call_function", target=target)[0]


def wrong_shape(graph: fx.Graph) -> None:
    node = first(graph, aten.rand_like.default)
    node.meta["val"] = node.meta["val"].new_empty(3)


def wrong_dtype(graph: fx.Graph) -> None:
    node = first(graph, aten.add.Tensor)
    node.meta["val"] = node.meta["val"].double()


def no_value(graph: fx.Graph) -> None:
    del first(graph, aten.add.Tensor).meta["val"]


def copied_view(graph: fx.Graph) -> None:
    """A call that copies, recorded as if it were a view."""
    node = first(graph, aten.view.default)
    node.target = aten.view_copy.default


def lost_draw(graph: fx.Graph) -> None:
    node = first(graph, aten.rand_like.default)
    node.target = aten.zeros_like.default


def lost_write(graph: fx.Graph) -> None:
    graph.erase_node(first(graph, aten.copy_.default))


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (wrong_shape, "shape"),
        (wrong_dtype, "dtypes torch.float64 and torch.float32"),
        (no_value, "it has no fake value"),
        (copied_view, "it does not share memory with an argument, the record says otherwise"),
        (lost_draw, "random draws were"),
        (lost_write, "written inputs were"),
    ],
)
def test_broken_program_is_found(breakage: Callable[[fx.Graph], None], message: str) -> None:
    def run(module: fx.GraphModule, record: PassRecord) -> None:
        breakage(module.graph)

    broken = Pass("broken", "", run, after="noop")
    options = {"check": True, "passes": [broken]}
    with pytest.raises(Exception, match="pass broken broke the program") as caught:
        compiled_by(program, torch.rand(2, 3), torch.rand(4), options=options)
    error = caught.value
    found = getattr(error, "inner_exception", error)
    assert isinstance(found, SpecError)
    assert message in str(found)
    compiled_by(program, torch.rand(2, 3), torch.rand(4), options={"check": True})


@pytest.mark.parametrize("dynamic", [False, True])
def test_model_passes_the_check(dynamic: bool) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor, up: Tensor, cache: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        total = x + residual
        normed = torch.nn.functional.rms_norm(total, (16,), weight, 1e-6)
        gate, value = (normed @ up).chunk(2, dim=-1)
        cache.index_copy_(0, at, normed)
        return torch.nn.functional.silu(gate) * value, total, torch.nn.functional.dropout(normed, 0.5)

    inputs = [torch.rand(4, 16), torch.rand(4, 16), torch.rand(16), torch.rand(16, 32), torch.zeros(9, 16)]
    piece = compiled_by(block, *inputs, torch.arange(4), options={"check": True}, dynamic=dynamic)
    assert sum(len(record.fired) for record in piece.records) >= 2


def test_views_follow_what_they_view() -> None:
    """After a rule has replaced what a view looks at, the view's record shares memory with the replacement."""

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return torch.nn.functional.rms_norm(total, (16,), weight, 1e-6), total.view(-1) * 2

    piece = compiled_by(block, torch.rand(4, 16), torch.rand(4, 16), torch.rand(16))
    assert piece.graph is not None
    view = first(piece.graph.graph, aten.view.default)
    assert str(view.args[0].args[0].target) == "npu_fused.add_rms_norm.default"  # type: ignore[union-attr]
    assert storage(view.meta["val"]) == storage(view.args[0].meta["val"])  # type: ignore[union-attr]


def test_an_input_copied_onto_itself_need_not_be_written() -> None:
    def unchanged(x: Tensor) -> Tensor:
        x.copy_(x.clone())
        return x + 1

    x = torch.rand(2, 3)
    (result,) = compiled_by(unchanged, x, options={"check": True})(x)
    assert torch.equal(result, x + 1)
