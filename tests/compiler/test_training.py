"""Under grad a compiled function runs uncaptured, with one warning; forward and backward are eager's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from npu_compiler.backend import AscendBackend
from npu_compiler.errors import TrainingWarning
from tests.compiler.test_capture import Compiled


class Block(nn.Module):
    """A residual block with a norm, in plain operators: what the rules would rewrite in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(8) + 0.5)
        self.gate_up = nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        h = self.norm * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up), total


def test_steps_of_an_optimizer_follow_the_cpu() -> None:
    expected, module = Block(), Block()
    module.load_state_dict(expected.state_dict())
    module = module.to("npu")
    backend = AscendBackend()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (expected, module)]
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            x, residual = torch.rand(2, 8), torch.rand(2, 8)
            losses = []
            for call, device in ((expected, "cpu"), (compiled, "npu")):
                y, total = call(x.to(device), residual.to(device))
                losses.append((y * total).sum())
                losses[-1].backward()
            torch.testing.assert_close(losses[1].cpu(), losses[0])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for got, want in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.detach().cpu(), want.detach())
    ours = [str(entry.message) for entry in caught if entry.category is TrainingWarning]
    assert len(ours) == 1
    assert "torch.inference_mode()" in ours[0]
    (graph,) = backend.compiled()
    assert not graph.records
    assert "gradients are needed" in str(graph)


def test_gradients_of_inputs_and_written_buffers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (x.sin() * self.calls)[1:]

    expected, module = Scaled(), Scaled().to("npu")
    compiled = torch.compile(module, backend=AscendBackend())
    with torch.enable_grad(), pytest.warns(TrainingWarning):
        for _ in range(3):
            x = torch.rand(4, requires_grad=True)
            on_device = x.detach().npu().requires_grad_()
            expected(x).sum().backward()
            compiled(on_device).sum().backward()
            torch.testing.assert_close(on_device.grad.cpu(), x.grad)
    assert module.calls.item() == 3


def test_dropout_draws_what_eager_draws() -> None:
    module = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to("npu")
    compiled = torch.compile(copy.deepcopy(module), backend=AscendBackend())
    x = torch.rand(2, 8, device="npu")
    results = []
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        for call in (module, compiled):
            torch.npu.manual_seed(1)
            results.append([call(x).detach().cpu() for _ in range(3)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_grad_modes_may_alternate() -> None:
    """Inference mode, no_grad and grad, each with its own graph; only the first two are captured."""
    compiled = Compiled(lambda x: x * 2 + 1, dynamic=False)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        for call in range(9):
            with modes[call % 3]():
                x = torch.full((4,), float(call), device="npu", requires_grad=call % 3 == 2)
                result = compiled(x)
                assert result.is_inference() == (call % 3 == 0)
                assert result.requires_grad == (call % 3 == 2)
                if result.requires_grad:
                    result.sum().backward()
                    assert x.grad.cpu().tolist() == [2.0] * 4
            assert result.detach().cpu().tolist() == [call * 2 + 1.0] * 4
    ledgers = [graph.ledger for graph in compiled.backend.compiled()]
    assert sum(ledger is None for ledger in ledgers) == 1
    assert sum(ledger.replays for ledger in ledgers if ledger is not None) == 4


def test_frozen_parameters_are_inference_even_under_grad() -> None:
    module = nn.Linear(4, 4).to("npu").requires_grad_(False)
    compiled = Compiled(module, dynamic=False)
    with torch.enable_grad():
        for _ in range(3):
            x = torch.rand(2, 4)
            torch.testing.assert_close(compiled(x.npu()).cpu(), copy.deepcopy(module).cpu()(x))
    assert compiled.ledger.replays == 2
