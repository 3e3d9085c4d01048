"""Random models of equal layers: compiled with their layers rolled up they are what eager makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from npu_compiler.backend import ascend
from npu_compiler.graph.rolled import Rolled
from tests.properties.draws import integers, one_of
from tests.properties.seeded import try_all

MODELS = 24
WIDTH = 8
NPU = torch.device("npu", 0)
STEPS = ("product", "relu", "sum", "scale", "parts", "cache", "count", "twice")
PROGRAMS: Counter[str] = Counter()


@dataclass(frozen=True)
class Shape:
    """A model: how many layers, the steps of each with the value that each reads, counted from the last, and what joins
    the layers."""

    layers: int
    steps: tuple[tuple[str, int], ...]
    residual: bool
    shared: bool
    returned: str


SHAPES = st.builds(
    Shape,
    layers=integers(6, 9),
    steps=st.lists(st.tuples(one_of(STEPS), integers(1, 3)), min_size=2, max_size=7).map(tuple),
    residual=st.booleans(),
    shared=st.booleans(),
    returned=one_of(("last", "last", "last", "two", "every")),
)


class Layer(nn.Module):
    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator).to(NPU) / 3, requires_grad=False)
        self.row = nn.Parameter(torch.rand(WIDTH, generator=generator).to(NPU) + 0.5, requires_grad=False)
        self.cache = torch.zeros(4, WIDTH, device=NPU)
        self.count = torch.zeros((), dtype=torch.int64, device=NPU)
        for state in (self.cache, self.count):
            torch._dynamo.mark_static_address(state)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        values = [shared, x, x]
        for step, read in self.shape.steps:
            values.append(self._step(step, values[-read]))
        found = values[-1] + x if self.shape.residual else values[-1]
        return found * shared if self.shape.shared else found

    def _step(self, step: str, x: Tensor) -> Tensor:
        if step == "product":
            return x @ self.weight
        if step == "sum":
            return x + x.mean(-1, keepdim=True)
        if step == "scale":
            return x * self.row
        if step == "parts":
            left, right = x.chunk(2, dim=-1)
            return torch.cat([right, left], dim=-1)
        if step == "cache":
            self.cache.index_copy_(0, torch.arange(2, device=NPU), x)
            return self.cache[:2] + self.cache[2:]
        if step == "count":
            found = x * (self.count + 1)
            self.count.add_(1)
            return found
        return torch.relu(x) if step == "relu" else x * 2


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape, seed) for seed in range(shape.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        shared, found = torch.sigmoid(x), [x]
        for layer in self.layers:
            found.append(layer(found[-1], shared).clamp(-4, 4))
        kept = {"last": 1, "two": 2, "every": len(self.layers)}[self.shape.returned]
        return tuple(found[-kept:])


def check(shape: Shape) -> None:
    torch._dynamo.reset()
    before = set(ascend.compiled())
    with torch.inference_mode():
        eager, compiled = Model(shape), Model(shape)
        call = torch.compile(compiled, backend="ascend", fullgraph=True)
        for seed in range(3):  # the first call, and two replays
            x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed)).to(NPU)
            torch.testing.assert_close(call(x), eager(x), rtol=1e-4, atol=1e-4)
        for one, two in zip(eager.layers, compiled.layers, strict=True):
            torch.testing.assert_close((two.cache, two.count), (one.cache, one.count), rtol=1e-4, atol=1e-4)
    (graph,) = set(ascend.compiled()) - before
    PROGRAMS["rolled" if isinstance(graph.program, Rolled) else "whole"] += 1


def test_layers_rolled_up_are_those_of_eager() -> None:
    PROGRAMS.clear()
    try_all(check, SHAPES, MODELS, number=40)
    assert PROGRAMS["rolled"] >= MODELS // 4, PROGRAMS
    assert PROGRAMS["whole"], PROGRAMS
