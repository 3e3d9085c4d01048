"""Rules and passes as a user would keep them in a module of their own; named by "module:attribute" in tests."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from npu_compiler import Pass, Rule
from npu_compiler.passes.pattern import Any, Call
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import NearMiss


def silu_program(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def other_factor(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x + 1)


SILU = Rule(
    "sigmoid_to_silu",
    pattern=Call("aten.mul.Tensor", Any("x"), Call("aten.sigmoid.default", Any("x")), commutes=True),
    replacement=lambda build, match: build(torch.ops.aten.silu.default, match.bindings["x"]),
    reference=silu_program,
    example=lambda dtype: (torch.randn(3, 8, dtype=dtype),),
    after=("aten.silu.default",),
    near_misses=(NearMiss(other_factor),),
)


def double_negation(module: fx.GraphModule, record: PassRecord) -> None:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default):
        inner = node.args[0]
        if inner.target is torch.ops.aten.neg.default:
            record.fire("double_negation", node, [node])
            node.replace_all_uses_with(inner.args[0])
            module.graph.erase_node(node)


NEGATIONS = Pass("negations", "before dead_code, which takes away what is left", double_negation, before="dead_code")
BOTH = [NEGATIONS, Pass("silu", "where the gates are joined", rules=(SILU,), after="swiglu")]
