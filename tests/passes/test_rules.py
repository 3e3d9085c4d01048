"""Every rule's own example: the rule fires on its reference program, once, and the result keeps its meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.passes import add_rms_norm, swiglu
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import Rule, apply
from tests.passes.lowered import calls, lowered

RULES = [*add_rms_norm.RULES, *swiglu.RULES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Fused operators round once where the reference rounds twice: one unit in the last place of the largest value.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def wide(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_on_its_example(rule: Rule, dtype: torch.dtype) -> None:
    if rule.name.startswith("vllm"):
        pytest.importorskip("vllm.ir.ops")
    torch.manual_seed(1)
    args = rule.example(dtype)
    program = lowered(rule.reference, *args)
    before = program.graph(*args)
    record = PassRecord("rules")
    apply(program.graph, [rule], record)
    program.graph.graph.lint()
    program.graph.recompile()
    assert [fired.rule for fired in record.fired] == [rule.name], str(record)
    assert calls(program.graph) == [f"npu_fused.{rule.operator}.default"]
    after = program.graph(*args)
    if rule.name.startswith("vllm"):
        oracle = before  # vLLM's own reference converts to float32, so float64 inputs would show nothing
    else:
        oracle = rule.reference(*wide(args)) if dtype is not torch.float32 else before
    for got, same, expected in zip(*map(tree_leaves, (after, before, oracle)), strict=True):
        assert got.dtype == same.dtype
        assert got.stride() == same.stride()
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_keeps_the_source_line(rule: Rule) -> None:
    if rule.name.startswith("vllm"):
        pytest.importorskip("vllm.ir.ops")
    args = rule.example(torch.float32)
    program = lowered(rule.reference, *args)
    names = [node.name for node in program.graph.graph.nodes if node.op == "call_function"]
    record = PassRecord("rules")
    apply(program.graph, [rule], record)
    (fused,) = [node for node in program.graph.graph.nodes if str(node.target).startswith("npu_fused.")]
    assert "passes/" in fused.meta["stack_trace"]
    assert fused.meta["npu_origin"]["pass"] == rule.name
    assert set(fused.meta["npu_origin"]["nodes"]) <= set(names)
    assert f"passes/{'add_rms_norm' if 'norm' in rule.name else 'swiglu'}.py:" in record.fired[0].place
