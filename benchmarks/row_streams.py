"""Blocks of two gated MLPs of the same norm, as a shared expert and a routed one are: on two streams and on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import devices
from benchmarks.harness import Contestant, Factory, Goal, Row
from benchmarks.row_decode_step import contestant

LAYERS, HIDDEN, INNER, ROWS = 4, 256, 1024, 8
TWO: dict[str, Any] = {"multistream": "auto", "stream_limit": 2}


class Gated(nn.Module):
    """down(silu(gate) * up) of [rows, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Blocks(nn.Module):
    """A residual stream [rows, hidden] to which each block adds two MLPs of its norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(LAYERS))
        self.shared = nn.ModuleList(Gated() for _ in range(LAYERS))
        self.routed = nn.ModuleList(Gated() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for norm, shared, routed in zip(self.norms, self.shared, self.routed, strict=True):
            normed = norm(x)
            x = x + shared(normed) + routed(normed)
        return x


def inputs() -> Tensor:
    return torch.rand(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))


def on_npu(name: str, options: dict[str, Any]) -> Factory:
    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            step = torch.compile(Blocks().to(device), backend="ascend", fullgraph=True, dynamic=False, options=options)
            x = inputs().to(device)
            for _ in range(3):  # compile, warm up and capture
                step(x)
            torch.npu.synchronize()
        return contestant(name, step, (x,), devices.wait())

    return factory


def on_cpu() -> Contestant:
    return contestant("cpu eager", Blocks(), (inputs(),), devices.nothing)


def rows() -> list[Row]:
    return [
        Row(
            name="two_streams",
            title=f"{LAYERS} blocks of two MLPs, hidden {HIDDEN}, inner {INNER}, {ROWS} rows, float32",
            unit="us",
            contestants={
                "two streams": on_npu("two streams", TWO),
                "one stream": on_npu("one stream", {}),
                "cpu eager": on_cpu,
            },
            reference="cpu eager",
            goals=(Goal(peer="one stream", faster_than=1.5),),
            tolerance=1e-4,
        )
    ]
