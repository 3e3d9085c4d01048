"""The same model gives the same bytes in every process: program, order, memory plan, streams, what was fired and
refused. Processes differ in where objects lie and in the order of sets (PYTHONHASHSEED)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npu_compiler.backend import AscendBackend
from npu_compiler.graph import serialized
from npu_compiler.graph.device import Device
from npu_compiler.passes.record import PassRecord
from npu_compiler.plan.dependencies import Dependencies
from npu_compiler.plan.schedule import place

ROOT = Path(__file__).parents[2]
FREE_EVENTS = Device(event=0.0)


class Layer(nn.Module):
    """Norms, a gate, branches that side streams take, a cache that is written."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(size))
        self.gate_up, self.side = nn.Linear(size, 4 * size, bias=False), nn.Linear(size, size)
        self.down = nn.Linear(2 * size, size, bias=False)
        self.register_buffer("cache", torch.zeros(8, size))

    def forward(self, x: Tensor, residual: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        h = self.norm * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))
        self.cache.index_copy_(0, slots, h)
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up) + self.side(h).sin() * self.cache.sum(0), total


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(16) for _ in range(layers))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual, slots)
        return x


def digest(content: object) -> str:
    data = content if isinstance(content, bytes) else str(content).encode()
    return hashlib.sha256(data).hexdigest()


def told(record: PassRecord) -> tuple[Any, ...]:
    """A record without the time it took."""
    return record.name, record.nodes_before, record.nodes_after, record.fired, record.refused


def compiled(layers: int, **options: Any) -> dict[str, str]:
    """A digest of each thing that a compilation makes."""
    backend = AscendBackend()
    model = Model(layers).to("npu")
    x, slots = torch.rand(4, 16).npu(), torch.arange(4).npu()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(slots, 0)
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(model, backend=backend, options=options, fullgraph=True)(x, slots)
    (graph,) = backend.compiled()
    assert graph.graph is not None
    assert graph.program is not None
    assert sum(len(record.fired) for record in graph.records) > layers
    plan = place(Dependencies.of(graph.graph.graph), {}, 3, FREE_EVENTS)
    assert plan.streams > 1
    return {
        "stored program": digest(serialized.dumps(graph.program)),
        "program": digest(graph.graph.graph),
        "order": digest(graph.arrangement),
        "memory": digest(graph.memory),
        "streams": digest(plan),
        "records": digest([told(record) for record in graph.records]),
    }


def main() -> None:
    for layers, options in ((8, {}), (2, {"multistream": "auto"})):
        for name, value in compiled(layers, **options).items():
            print("digest", layers, name, value)


def test_the_same_bytes_in_every_process() -> None:
    command = [sys.executable, "-m", "tests.compiler.test_same_bytes"]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, text=True, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert not any(process.returncode for process in started), printed
    one, other = ([line for line in text.splitlines() if line.startswith("digest ")] for text in printed)
    assert len(one) == 12, one
    assert one == other


if __name__ == "__main__":
    main()
