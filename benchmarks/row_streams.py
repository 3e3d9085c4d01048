"""Blocks of two branches of the same norm, as a shared expert and a routed one are: on two streams and on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import devices
from benchmarks.harness import Contestant, Factory, Goal, Row
from benchmarks.row_decode_step import contestant

LAYERS, DEPTH, HIDDEN, INNER, ROWS = 4, 4, 128, 128, 128
"""Products small enough that, by the estimate, one leaves half of the matrix unit to another; a branch has DEPTH times
two of them, so that it lasts longer than it takes to wake a thread."""
WAYS: dict[str, dict[str, Any]] = {"two streams": {"multistream": "auto", "stream_limit": 2}, "one stream": {}}
"""Compile options of the contestants on the device."""


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
    """A residual stream [rows, hidden] to which each block adds two branches of its norm, DEPTH MLPs each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, eps=1e-6) for _ in range(LAYERS))
        self.shared = nn.ModuleList(nn.Sequential(*(Gated() for _ in range(DEPTH))) for _ in range(LAYERS))
        self.routed = nn.ModuleList(nn.Sequential(*(Gated() for _ in range(DEPTH))) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for norm, shared, routed in zip(self.norms, self.shared, self.routed, strict=True):
            normed = norm(x)
            x = x + shared(normed) + routed(normed)
        return x


def inputs() -> Tensor:
    return torch.rand(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))


def compiled(options: dict[str, Any]) -> Callable[[], Tensor]:
    """A step on the device, captured.

    Raises:
        AssertionError: on another number of streams than the options are for.
    """
    from npu_compiler.backend import AscendBackend  # brings up torch_npu, which the page of figures needs not

    device = devices.npu()
    backend = AscendBackend()
    with torch.inference_mode():
        run = torch.compile(Blocks().to(device), backend=backend, fullgraph=True, dynamic=False, options=options)
        x = inputs().to(device)
        for _ in range(3):  # compile, warm up and capture
            run(x)
        torch.npu.synchronize()
    (entry,) = backend.compiled()
    assert entry.ledger is not None
    streams = [capture.streams for capture in entry.ledger.captures]
    assert all(bool(said) == bool(options) for said in streams), f"{options}: captured on other streams: {streams}"
    return lambda: run(x)


def on_npu(name: str) -> Factory:
    def factory() -> Contestant:
        with devices.needed(name):
            step = compiled(WAYS[name])
        return contestant(name, step, (), devices.wait())

    return factory


def on_cpu() -> Contestant:
    return contestant("cpu eager", Blocks(), (inputs(),), devices.nothing)


def rows() -> list[Row]:
    return [
        Row(
            name="two_streams",
            title=f"{LAYERS} blocks of 2 x {DEPTH} MLPs, {ROWS} rows, hidden {HIDDEN}, inner {INNER}, float32",
            unit="us",
            contestants={
                **{name: on_npu(name) for name in WAYS},
                "cpu eager": on_cpu,
            },
            reference="cpu eager",
            goals=(Goal(peer="one stream", faster_than=1.5),),
            tolerance=1e-4,
        )
    ]
