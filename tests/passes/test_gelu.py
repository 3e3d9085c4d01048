"""gelu: the ways in which models write it out, and the encoders that do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from npu_compiler.passes import gelu
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(gelu.NAME, "", rules=gelu.RULES)
TANH, FAST = "aten.gelu.default", "npu_fused.fast_gelu.default"


def of_bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (ACT2FN["gelu_new"], TANH),
        (ACT2FN["gelu_fast"], TANH),
        (ACT2FN["gelu_accurate"], TANH),
        (of_bloom, TANH),
        (ACT2FN["quick_gelu"], FAST),
    ],
    ids=["gelu_new", "gelu_fast", "gelu_accurate", "bloom", "quick_gelu"],
)
def test_of_transformers(function: nn.Module, operator: str, inference: bool) -> None:
    x = 4 * torch.randn(3, 7, 16)
    program = lowered(lambda x: function(x), x, inference=inference)
    apply(PASS, program.graph)
    assert calls(program.graph) == [operator]
    torch.testing.assert_close(program.graph(x)[0], function(x))


@pytest.mark.parametrize("name", ["gelu_python", "gelu_10"])
def test_other_functions_stay(name: str) -> None:
    """By erf, and with a ceiling."""
    program = lowered(lambda x: ACT2FN[name](x), torch.randn(3, 16))
    assert not apply(PASS, program.graph).fired


def test_dynamic_sizes() -> None:
    x = torch.randn(5, 16)
    torch._dynamo.mark_dynamic(x, 0)
    program = lowered(lambda x: ACT2FN["gelu_new"](x), x, dynamic=None)
    apply(PASS, program.graph)
    assert calls(program.graph) == [TANH]
