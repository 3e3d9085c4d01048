"""Fork and spawn, pickling and copying, torch.compiler.reset."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, nn

from npu_compiler.backend import AscendBackend
from npu_compiler.errors import CaptureError, NpuCompilerError
from tests.compiler.test_capture import Compiled


def scaled(x: Tensor) -> Tensor:
    return torch.cos(x) * 2 + 1


def use_compiled(connection: Connection) -> None:
    """In a child: three compiled calls; sends the last result, or what was raised."""
    try:
        run = torch.compile(scaled, backend="ascend")
        with torch.no_grad():
            for step in range(3):
                result = run(torch.full((4,), float(step), device="npu")).cpu()
        connection.send(result.tolist())
    except RuntimeError as error:
        connection.send(f"{type(error).__name__}: {error}")


def from_child(method: str) -> object:
    """What `use_compiled` sends from a process started by `method`."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=use_compiled, args=(theirs,))
    child.start()
    try:
        assert ours.poll(120), "the child is silent"
        return ours.recv()
    finally:
        child.join(30)
        if child.is_alive():
            child.kill()


def test_spawned_process_compiles_for_itself() -> None:
    compiled = Compiled(scaled, dynamic=False)
    compiled(torch.rand(4).npu())
    assert from_child("spawn") == pytest.approx(scaled(torch.full((4,), 2.0)).tolist())


def test_forked_process_is_told_to_spawn() -> None:
    torch.rand(4).npu()
    sent = from_child("fork")
    assert isinstance(sent, str)
    assert "forked subprocess" in sent
    assert "spawn" in sent


def test_compiled_module_pickles_and_copies_as_the_plain_one() -> None:
    module = nn.Linear(3, 3).to("npu")
    module.compile(backend=AscendBackend())
    x = torch.rand(2, 3).npu()
    expected = module(x).cpu()
    module(x)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(x).cpu(), expected)
        with torch.no_grad():
            other.weight.zero_()
    assert torch.equal(module(x).cpu(), expected), "the copies have their own parameters"


def test_wrapped_module_is_copied_with_its_own_parameters() -> None:
    module = nn.Linear(3, 3).to("npu")
    compiled = torch.compile(module, backend=AscendBackend())
    x = torch.rand(2, 3).npu()
    expected = compiled(x).cpu()
    other = copy.deepcopy(compiled)
    assert torch.equal(other(x).cpu(), expected)
    other.get_parameter("weight").zero_()
    assert not torch.equal(other(x).cpu(), expected)
    assert torch.equal(compiled(x).cpu(), expected)


def test_errors_cross_processes_whole() -> None:
    error = CaptureError("what", where="model.py:3", rule="rule", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CaptureError
    assert isinstance(again, NpuCompilerError)
    assert (str(again), again.where, again.fix) == (str(error), "model.py:3", "fix")


def test_reset_drops_graphs_and_their_memory() -> None:
    torch.npu.synchronize()
    gc.collect()
    torch.npu.empty_cache()
    before = torch.npu.memory_allocated()
    compiled = Compiled(lambda x: (x @ x).cos() @ x, dynamic=False)
    x = torch.rand(512, 512).npu()
    for _ in range(2):
        expected = compiled(x).cpu()
    torch.compiler.reset()
    assert torch.equal(compiled(x).cpu(), expected), "compiled anew"
    del compiled, x
    torch.compiler.reset()
    gc.collect()
    torch.npu.empty_cache()
    assert torch.npu.memory_allocated() <= before
