"""Equal layers of vLLM's models are compiled once: the program is the one that compiling all of them gives."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx
from vllm.compilation.passes.inductor_pass import CallableInductorPass

from npu_compiler.graph.source import TIMES
from npu_compiler.passes.pipeline import LAYERS_ONCE
from npu_compiler.serving.compiler import PassManager
from tests.compiler.test_layers_once import counts, program
from tests.passes import vllm_graphs
from tests.passes.vllm_graphs import Shape

LAYERS = 7
CHANGES: dict[str, Any] = {
    "qwen3": (),
    "llama": (),
    "gemma2": (("layer_types", ("full_attention",) * LAYERS),),
}


def check(family: str, options: dict[str, Any]) -> None:
    """The first layer has a norm without a residual: all but one are equal."""
    graph = vllm_graphs.graph(Shape(family, changes=(("num_hidden_layers", LAYERS), *CHANGES[family])))
    options = options | {"check": True}
    once = graph.compiled_by_vllm(options)
    each = graph.compiled_by_vllm(options | {"layers_once": False})
    assert [entry.rule for entry in once.records[0].fired] == [f"{LAYERS_ONCE}: {LAYERS - 1} equal layers, 4 compiled"]
    assert once.graph is not None
    assert each.graph is not None
    assert program(once.graph.graph) == program(each.graph.graph)
    assert counts(once) == counts(each)
    assert not any(TIMES in node.meta for node in once.graph.graph.nodes)


@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama", "gemma2"))]
)
def test_the_program_is_that_of_compiling_each(family: str) -> None:
    check(family, {})


@pytest.mark.full
def test_calls_of_vllms_own_lowering_are_repeated_too() -> None:
    """Norms that no rule takes are taken apart by vLLM's pass behind the rules."""
    check("llama", {"disabled_passes": ["add_rms_norm"]})


def test_a_pass_of_the_users_sees_every_layer() -> None:
    def look(graph: fx.Graph) -> None:
        raise AssertionError("it is only asked for")

    manager = PassManager()
    assert manager.local
    manager.add(CallableInductorPass(look))
    assert not manager.local
