"""A user's own rules in vLLM: named in additional_config, and a pass of vLLM's own kind through its hook."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx
from vllm.compilation.passes.inductor_pass import CallableInductorPass

from npu_compiler import Rule
from npu_compiler.inspect import bundle
from npu_compiler.passes.pattern import Any, Call, Half
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs

FIRED: list[str] = []
SEEN: list[str] = []


def gate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


def by_sigmoid(build, match) -> fx.Node:  # type: ignore[no-untyped-def]
    """silu(gate) * up in other operators, so that the result tells which rule had it."""
    FIRED.append(match.root.name)
    first, second = build.unpack(build(torch.ops.aten.chunk.default, match.bindings["x"], 2, -1))
    active = build(torch.ops.aten.mul.Tensor, first, build(torch.ops.aten.sigmoid.default, first))
    return build(torch.ops.aten.mul.Tensor, active, second)


OWN_GATE = Rule(
    "own_gate",
    pattern=Call("aten.mul.Tensor", Call("aten.silu.default", Half(Any("x"), 0)), Half(Any("x"), 1), commutes=True),
    replacement=by_sigmoid,
    reference=gate,
    example=lambda dtype: (torch.randn(3, 8, dtype=dtype),),
)


def look(graph: fx.Graph) -> None:
    """A pass for vLLM's hook post_grad_custom_post_pass."""
    SEEN.extend(str(node.target) for node in graph.nodes if node.op == "call_function")


def test_rules_and_passes_of_the_user_are_applied_and_in_the_dump(tmp_path: Path) -> None:
    folder = checkpoints.cached(checkpoints.Shape(family="qwen3"))
    settings = graphs("FULL_DECODE_ONLY")
    hook = {"post_grad_custom_post_pass": CallableInductorPass(look)}
    settings["compilation_config"] |= {"inductor_compile_config": hook, "debug_dump_path": str(tmp_path)}
    options = {"compile": {"rules": [f"{__name__}:OWN_GATE"], "check": True}}
    prompts = oracle.prompts()[:2]
    with engine(folder, additional_config=options, **settings) as llm:
        tokens = generate(llm, prompts, 16)
    assert tokens == [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    assert FIRED, "the user's rule comes before the built-in one"
    assert "aten.sigmoid.default" in SEEN
    assert "npu_fused.swiglu.default" not in SEEN
    written = bundle.open(tmp_path)
    assert written.header.environment.versions["vllm"].startswith("0.32")
    fired = [fire.rule for graph in written.graphs for stage in graph.stages for fire in stage.fired]
    assert "own_gate" in fired
    for graph in written.graphs:
        assert any(
            "model.layers." in call.place.module or call.place.file for call in graph.program(graph.stages[0]).calls
        )
        assert "torch.ops." in graph.python(graph.stage("final"))
