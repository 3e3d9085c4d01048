"""Compiled ahead of time by torch's `aot_compile`: called without Dynamo, written to a file, loaded elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.aot_compile import AOTCompiledFunction
from torch._dynamo.exc import PackageError

from npu_compiler import report
from npu_compiler.backend import ascend
from npu_compiler.compiled import CompiledGraph
from npu_compiler.errors import StoredProgramError
from npu_compiler.portable import Portable
from npu_compiler.stages import CAPTURE, FIRST_CALL, PLAN
from tests.compiler.user_rules import SILU, silu_program
from tests.models import checkpoints

ROOT = Path(__file__).parents[2]


class Step(nn.Module):
    """A gated product whose result is kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(32, 64, generator=generator).npu())
        self.register_buffer("kept", torch.zeros(8, 32).npu())

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (x @ self.up).chunk(2, dim=-1)
        y = nn.functional.silu(gate) * up
        self.kept.index_copy_(0, at, y)
        return y, self.kept.sum(0)


def arguments(rows: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-2, 2, rows * 32).reshape(rows, 32).npu(), torch.arange(rows).npu()


def compiled(model: nn.Module, *inputs: Tensor, dynamic: bool = False, **options: Any) -> AOTCompiledFunction:
    torch._dynamo.reset()
    wrapped = torch.compile(model, backend="ascend", fullgraph=True, dynamic=dynamic, options=options)
    with torch.inference_mode():
        return wrapped.forward.aot_compile((inputs, {}))


def loaded(function: AOTCompiledFunction) -> AOTCompiledFunction:
    """The function as another process gets it. torch makes its guards anew, in the mode in which it is loaded."""
    written = function.serialize(function).serialized_data
    with torch.inference_mode():
        return torch.compiler.load_compiled_function(io.BytesIO(written))


def graph_of(function: AOTCompiledFunction) -> CompiledGraph:
    return cast(Portable, function._artifacts.compiled_fn).compiled


def check(function: AOTCompiledFunction, model: nn.Module, *sizes: int) -> None:
    """Calls give what the eager model gives, and keep in its buffer what it would keep."""
    for rows in sizes:
        x, at = arguments(rows)
        with torch.inference_mode():
            found, buffer = function(model, x, at), model.kept.clone()
            model.kept.zero_()
            expected = model(x, at)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(buffer, model.kept)
            model.kept.zero_()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_calls_are_replays(guarded: bool) -> None:
    model = Step()
    function = compiled(model, *arguments(4))
    if not guarded:
        function.disable_guard_check()
    check(function, model, *[4] * 5)
    ledger = graph_of(function).ledger
    assert ledger is not None and ledger.replays == 4
    assert graph_of(function) in ascend.compiled()


def test_guards_refuse_what_it_was_not_compiled_for() -> None:
    model = Step()
    function = compiled(model, *arguments(4))
    inputs = arguments(5)
    with pytest.raises(RuntimeError, match=r"size mismatch at index 0\. expected 4, actual 5"), torch.inference_mode():
        function(model, *inputs)


def test_a_model_of_transformers_is_compiled_with_the_guards_on_tensors() -> None:
    """torch can't write the others, whatever the backend."""
    model = checkpoints.random_model(checkpoints.Shape(hidden=32, heads=2, kv_heads=1)).npu()
    tokens = torch.arange(8).npu()[None]
    model.config.use_cache = False
    with pytest.raises(PackageError, match="ID_MATCH guard"):
        compiled(model, tokens)
    function = compiled(model, tokens, guard_filter_fn=torch.compiler.keep_tensor_guards_unsafe)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(function(model, tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="size mismatch at index 1"):
            function(model, tokens[:, :5])
    ledger = graph_of(function).ledger
    assert ledger is not None and ledger.replays == 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_loaded_program_is_the_one_that_was_written(dynamic: bool) -> None:
    model = Step()
    options = {"clone_outputs": True, "capture_limit": 2}
    first = compiled(model, *arguments(4), dynamic=dynamic, **options)
    second = loaded(loaded(first))  # what is loaded can be written again
    check(second, model, *([4, 4, 3, 3, 5, 4] if dynamic else [4, 4]))
    one, two = graph_of(first), graph_of(second)
    assert two.options == one.options
    assert two.graph is not None and one.graph is not None
    assert [str(node.target) for node in two.graph.graph.nodes] == [str(node.target) for node in one.graph.graph.nodes]
    assert two.ledger is not None and len(two.ledger.captures) == (4 if dynamic else 1)
    assert two.stages.costs.keys() == {PLAN, FIRST_CALL, CAPTURE}
    assert "program from a file" in report()


def test_inputs_that_share_memory_do_so_where_it_is_loaded() -> None:
    def both(rows: Tensor, part: Tensor) -> Tensor:
        return rows[1:] * 2 + part

    torch._dynamo.reset()
    rows = torch.randn(4, 8).npu()
    wrapped = torch.compile(both, backend="ascend", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        function = loaded(wrapped.aot_compile(((rows, rows[1:]), {})))
        for _ in range(3):
            torch.testing.assert_close(function(rows, rows[1:]), rows[1:] * 3)


def test_what_own_rules_did_is_written_and_the_rules_are_not() -> None:
    torch._dynamo.reset()
    options = {"rules": [SILU]}
    wrapped = torch.compile(silu_program, backend="ascend", fullgraph=True, dynamic=False, options=options)
    x = torch.randn(4).npu()
    with torch.inference_mode():
        function = wrapped.aot_compile(((x,), {}))
        again = loaded(function)
        torch.testing.assert_close(again(x), silu_program(x))
    assert graph_of(again).options.rules == ()
    assert any(entry.rule == SILU.name for record in graph_of(again).records for entry in record.fired)


def test_what_is_no_plain_data_is_not_written() -> None:
    torch._dynamo.reset()
    wrapped = torch.compile(lambda x: x[1:], backend="ascend", fullgraph=True, dynamic=False)
    x = torch.randn(4).npu()
    with torch.inference_mode():
        function = wrapped.aot_compile(((x,), {}))
        torch.testing.assert_close(function(x), x[1:])
    with pytest.raises(StoredProgramError, match="can't be written: outputs are views"):
        function.serialize(function)


def test_another_process_takes_the_file(tmp_path: Path) -> None:
    model, file = Step(), tmp_path / "step.compiled"
    compiled(model, *arguments(4), dynamic=True).save_compiled_function(str(file))
    code = f"""
import torch
from tests.compiler.test_portable import Step, check
with open({str(file)!r}, "rb") as written, torch.inference_mode():
    function = torch.compiler.load_compiled_function(written)
check(function, Step(), 4, 4, 6, 6)
import npu_compiler
print(npu_compiler.report())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "2 replays" in result.stdout and "lowering" not in result.stdout
