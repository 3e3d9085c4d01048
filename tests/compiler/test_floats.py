"""Python floats in dynamically compiled functions: a module's are constants, the caller's stay inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import npu_compiler
from npu_compiler.backend import ascend


class Norm(nn.Module):
    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def test_epsilon_of_a_module_is_a_constant() -> None:
    module = Norm(1e-5)
    on_device = Norm(1e-5).to("npu")
    on_device.load_state_dict(module.state_dict())
    compiled = torch.compile(on_device, backend="ascend", dynamic=True)
    for epsilon in (1e-5, 1e-5, 0.7):
        module.epsilon = on_device.epsilon = epsilon
        for rows in (3, 5, 3):
            x = torch.rand(rows, 16)
            assert torch.allclose(compiled(x.npu()).cpu(), module(x), atol=1e-6)
    graphs = ascend.compiled()
    assert len(graphs) == 2, "compiled again only for the other epsilon"
    for graph in graphs:
        assert [entry.rule for record in graph.records for entry in record.fired] == ["rms_norm"]
        assert graph.ledger is not None
        assert len(graph.ledger.captures) == 2


def test_float_argument_stays_an_input() -> None:
    compiled = torch.compile(lambda x, scale: x * scale, backend="ascend", dynamic=True)
    for scale in (2.0, 3.0, 4.5):
        assert compiled(torch.ones(3, device="npu"), scale).cpu().eq(scale).all()
    assert len(ascend.compiled()) == 1
    assert "uncaptured: scalar in host memory: scale" in npu_compiler.report()
