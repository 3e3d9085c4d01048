"""Compile a small model for the NPU, look at what the compiler did, and use it in the ways that need care.

python examples/compile_a_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import npu_compiler


class Block(nn.Module):
    """A pre-norm residual block with a gated feed-forward layer, and a count of its calls."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(size))
        self.gate_up = nn.Linear(size, 4 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        total = x + residual
        h = self.norm * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.dropout(self.down(nn.functional.silu(gate) * up)), total


def main() -> None:
    torch.manual_seed(0)
    on_cpu = Block(64).eval()
    model = Block(64).eval()
    model.load_state_dict(on_cpu.state_dict())
    model = model.to("npu")
    compiled = torch.compile(model, backend="ascend", fullgraph=True)

    with torch.inference_mode():
        for _ in range(4):  # the first call captures, the others replay
            x, residual = torch.rand(4, 64), torch.rand(4, 64)
            for got, want in zip(compiled(x.npu(), residual.npu()), on_cpu(x, residual), strict=True):
                torch.testing.assert_close(got.cpu(), want)
    print(f"four calls, counted on the device: {model.calls.item()}")
    print(npu_compiler.report())

    model.train()  # dropout draws from the NPU's generator: seeded, a compiled function drops what eager drops
    with torch.inference_mode():
        torch.npu.manual_seed(7)
        dropped = model(x.npu(), residual.npu())[0].cpu() == 0
        torch.npu.manual_seed(7)
        assert torch.equal(compiled(x.npu(), residual.npu())[0].cpu() == 0, dropped)
    print(f"dropout with the same seed: the same {dropped.sum()} elements as in eager")


if __name__ == "__main__":
    main()
