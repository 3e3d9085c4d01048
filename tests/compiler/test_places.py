"""Messages name the line of the user's model that they are about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from npu_compiler import Pass
from npu_compiler.backend import AscendBackend
from npu_compiler.errors import CaptureBudgetWarning, TrainingWarning
from npu_compiler.passes.record import PassRecord


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.held = torch.ones(4)  # no buffer: it stays in host memory

    def forward(self, x: Tensor, mixes: bool = False, draws: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = x * self.scale
        if mixes:
            return torch.relu(x), self.held * 2
        if draws:
            x = x + torch.rand_like(x)
        return torch.relu(x)


def compiled(**options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(Model().npu(), backend=AscendBackend(), dynamic=False, options=options)


def drop_draws(module: fx.GraphModule, record: PassRecord) -> None:
    for node in list(module.graph.nodes):
        if "rand" in str(node.target):
            node.replace_all_uses_with(module.graph.find_nodes(op="placeholder")[0])
            module.graph.erase_node(node)


def write_input(module: fx.GraphModule, record: PassRecord) -> None:
    add = next(node for node in module.graph.nodes if "mul" in str(node.target))
    with module.graph.inserting_after(add):
        made = module.graph.call_function(torch.ops.aten.zero_.default, (add.args[0],))
    made.meta = {**add.meta, "val": add.args[0].meta["val"]}


def said(run: Callable[[], Any], kind: type[BaseException]) -> str:
    with torch.inference_mode(), pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def test_tensors_of_several_devices() -> None:
    run = compiled()
    text = said(lambda: run(torch.ones(2, 4).npu(), mixes=True), torch._dynamo.exc.BackendCompilerFailed)
    assert "mixed with tensors on npu:0" in text and "return torch.relu(x), self.held * 2" in text


def test_an_output_that_is_in_use() -> None:
    run = compiled(clone_outputs=False)
    with torch.inference_mode():
        kept = [run(torch.ones(2, 4).npu()) for _ in range(2)][-1]
    text = said(lambda: run(torch.ones(2, 4).npu()), RuntimeError)
    assert kept.shape == (2, 4)
    assert "output 0 of an earlier call is still in use" in text and "return torch.relu(x)" in text


@pytest.mark.parametrize(
    ("wrong", "line", "fault"),
    [(drop_draws, "x = x + torch.rand_like(x)", "random draws were"), (write_input, "x = x * self.scale", "written")],
)
def test_a_pass_that_breaks_a_program(wrong: Callable[..., None], line: str, fault: str) -> None:
    run = compiled(check=True, passes=[Pass("wrong", "any", wrong, after="noop")])
    text = said(lambda: run(torch.ones(2, 4).npu(), draws=True), torch._dynamo.exc.BackendCompilerFailed)
    assert fault in text and f"where: {__file__}" in text and line in text


def test_warnings() -> None:
    run = compiled(capture_budget_seconds=1e-9)
    with torch.inference_mode(), pytest.warns(CaptureBudgetWarning, match=r"x = x \* self\.scale"):
        run(torch.ones(2, 4).npu())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.enable_grad():
            compiled()(torch.ones(2, 4).npu()).sum().backward()
    (warning,) = [entry for entry in caught if entry.category is TrainingWarning]
    assert "x = x * self.scale" in str(warning.message)
