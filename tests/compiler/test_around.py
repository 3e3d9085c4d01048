"""What is around a program at each call: AOTAutograd's wrapper where the program needs it, else graph/around.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

from npu_compiler.backend import ascend, compile_fx
from npu_compiler.cache import FOLDER
from npu_compiler.errors import TrainingWarning
from npu_compiler.graph.around import Around
from tests.compiler.test_capture import Compiled, assert_same, check, to_npu

WRAPPER = "_aot_autograd/runtime_wrappers.py"


def wrapped(run: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    """Whether a call goes through AOTAutograd's wrapper, and what it returns."""
    found = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        found.append(event == "call" and code.co_name == "runtime_wrapper" and code.co_filename.endswith(WRAPPER))

    sys.setprofile(note)
    try:
        result = run(*args)
    finally:
        sys.setprofile(None)
    return any(found), result


class Step(nn.Module):
    """A model that keeps rows, as a decoder keeps keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("kept", torch.zeros(6, 8))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        rows = self.project(x)
        self.kept.index_copy_(0, at, rows)
        return torch.softmax(rows @ self.kept.t(), -1) @ self.kept


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_plain_model_passes_the_wrapper_by(dynamic: bool) -> None:
    expected, model = Step(), Step()
    model.load_state_dict(expected.state_dict())
    model = model.npu()
    compiled = Compiled(model, dynamic=dynamic)
    for call, rows in enumerate([2, 3, 2, 3] if dynamic else [2, 2, 2]):
        arguments = torch.rand(rows, 8), torch.randperm(6)[:rows]
        through, found = wrapped(compiled, *to_npu(arguments))
        assert through == (call == 0), "torch watches custom operators at the first call, and only there"
        assert_same(found, expected(*arguments))
        assert_same(model.kept, expected.kept)
    assert compiled.ledger.replays == 2


def piece(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A function as vLLM gives a piece of a model: Dynamo takes nothing of its convention away."""
    module = torch.fx.symbolic_trace(function)
    output = module.graph.output_node()
    output.args = (tuple(tree_leaves(output.args)),)
    module.recompile()
    return compile_fx(module, args)


def turns(x: Tensor) -> Tensor:
    x.t_()
    return x + 1


def writes_one_of_two(x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return x + y


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "returns a view of an input": lambda x: (x[1:], x + 1),
    "returns an input": lambda x: (x, x + 1),
    "changes an input's shape": turns,
}


@pytest.mark.parametrize("case", KEPT)
def test_what_the_program_does_not_do_keeps_the_wrapper(case: str) -> None:
    function, here = KEPT[case], torch.rand(4, 2)
    there = here.npu()
    compiled = piece(function, there.clone())
    for _ in range(3):
        through, found = wrapped(compiled, there)
        assert through
        expected = tree_leaves(function(here))
        assert_same(found, expected)
        assert_same(there, here)
        for got, want in zip(found, expected, strict=True):
            same = want.untyped_storage().data_ptr() == here.untyped_storage().data_ptr()
            assert (got.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()) == same


def test_a_first_call_that_fails_is_made_again() -> None:
    """At a first call torch watches what custom operators return: nothing is watched in one that fails."""
    calls = []

    def first(x: int) -> list[int]:
        calls.append(x)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return [x]

    call = Around().call(lambda x: [-x], first=first)
    with pytest.raises(torch.OutOfMemoryError):
        call(1)
    assert [call(2), call(3)] == [[2], [-3]]


def test_inputs_that_overlap_and_are_written_keep_the_wrapper() -> None:
    compiled = Compiled(writes_one_of_two, dynamic=False)
    here, there = torch.zeros(6), torch.zeros(6).npu()
    for _ in range(3):
        through, found = wrapped(compiled, there[:4], there[2:])
        assert through
        assert_same(found, writes_one_of_two(here[:4], here[2:]))
        assert_same(there, here)


def test_one_tensor_given_twice_and_written_keeps_the_wrapper() -> None:
    x = torch.zeros(4).npu()
    compiled = piece(writes_one_of_two, x, x)
    for call in range(1, 4):
        through, (found,) = wrapped(compiled, x, x)
        assert through
        assert found.cpu().tolist() == [2.0 * call] * 4


def test_parameters_of_the_graph_keep_the_wrapper() -> None:
    model = nn.Linear(4, 4).npu()
    compiled = piece(model, torch.rand(2, 4).npu())
    for _ in range(3):
        x = torch.rand(2, 4).npu()
        through, (found,) = wrapped(compiled, x)
        assert through
        torch.testing.assert_close(found, model(x))


def test_gradients_keep_the_wrapper() -> None:
    compiled = Compiled(lambda x: (x * 2).sum(), dynamic=False)
    with torch.enable_grad(), pytest.warns(TrainingWarning):
        for _ in range(2):
            x = torch.rand(4, device="npu", requires_grad=True)
            through, found = wrapped(compiled, x)
            assert through
            found.backward()
            assert x.grad is not None and x.grad.cpu().tolist() == [2.0] * 4


def test_tensors_that_are_made_of_tensors_keep_the_wrapper() -> None:
    def pair() -> TwoTensor:
        return TwoTensor(torch.ones(4).npu(), torch.zeros(4).npu())

    compiled = Compiled(lambda x: x + 1, dynamic=False)
    for _ in range(3):
        through, found = wrapped(compiled, pair())
        assert through
        assert (found.a.cpu().tolist(), found.b.cpu().tolist()) == ([2.0] * 4, [1.0] * 4)


def test_checks_that_torch_is_asked_for_keep_the_wrapper() -> None:
    with functorch_config.patch(debug_assert=True):
        compiled = Compiled(lambda x: x + 1, dynamic=False)
        for _ in range(3):
            through, found = wrapped(compiled, torch.zeros(2).npu())
            assert through and found.cpu().tolist() == [1.0, 1.0]


@pytest.fixture(params=["compiled", "from the cache"])
def road(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compiles a function, which is stored already on the second road; also what the first call returned."""
    monkeypatch.setenv(FOLDER, str(tmp_path))

    def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
        if request.param == "from the cache":
            torch.compile(function, backend="ascend", dynamic=False, options={"cache": True})(*args)
            torch._dynamo.reset()
        run = torch.compile(function, backend="ascend", dynamic=False, options={"cache": True})
        first = run(*args)
        assert ascend.compiled()[-1].stored == ("stored" if request.param == "compiled" else request.param)
        return run, first

    return compiled


def best(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.argmax(-1), (x * 2).detach()


def test_nothing_is_differentiated(road: Callable[..., Any]) -> None:
    x = torch.rand(2, 4, device="npu", requires_grad=True)
    with torch.enable_grad():
        run, first = road(best, x)
        for place, twice in (first, run(x), run(x)):
            assert not twice.requires_grad
            assert_same([place, twice], best(x.detach().cpu()))


def counted(total: Tensor, x: Tensor) -> Tensor:
    total.add_(x)
    return total * 2


def test_autograd_hears_of_what_a_replay_wrote(road: Callable[..., Any]) -> None:
    total, x = torch.ones(4).npu(), torch.ones(4).npu()
    run, _ = road(counted, total, x)
    weight = torch.ones(4, device="npu", requires_grad=True)
    with torch.enable_grad():
        loss = (weight * total).sum()
    run(total, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_full(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("npu", enabled=False):
        return x @ y


def test_autocast_is_not_applied_to_a_program_again(road: Callable[..., Any]) -> None:
    x, y = torch.rand(4, 4), torch.rand(4, 4)
    with torch.autocast("npu", dtype=torch.bfloat16):
        run, first = road(in_full, x.npu(), y.npu())
        for found in (first, run(x.npu(), y.npu())):
            assert_same(found, x @ y)


def test_what_is_compiled_next_hears_of_dynamic_sizes() -> None:
    compiled = check(lambda x: x * 2, [(torch.rand(n, 2),) for n in (3, 4, 3)], dynamic=True)
    for rows in (3, 4):
        through, found = wrapped(compiled, torch.rand(rows, 2).npu())
        assert not through
        assert 0 in found._dynamo_propagated_dynamic_indices
