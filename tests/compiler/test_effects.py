"""Operators with an effect on the host, in order, which AOTAutograd threads a token through: they run at every call,
uncaptured, and the token is no tensor of the caller's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from npu_compiler import reasons
from npu_compiler.backend import AscendBackend

NOTED: list[float] = []


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """`note(x)` writes down a sum: an effect that has to happen at every call, and in order."""
    with torch.library._scoped_library("effects_test", "DEF") as library:
        library.define("note(Tensor x) -> Tensor")

        def note(x: Tensor) -> Tensor:
            NOTED.append(x.sum().item())
            return x + 1

        library.impl("note", note, "CompositeExplicitAutograd")
        library.impl("note", torch.empty_like, "Meta")
        handle = _register_effectful_op(torch.ops.effects_test.note.default, _EffectType.ORDERED)
        yield
        handle.destroy()


def solved(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.inv(x) @ y


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_a_check_that_raises(
    dynamic: bool, cache: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.linalg.inv checks on the host that its argument is no singular matrix."""
    monkeypatch.setenv("NPU_COMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
    torch._dynamo.reset()
    backend = AscendBackend()
    options = {"check": True, "cache": cache}
    run = torch.compile(solved, backend=backend, dynamic=dynamic, fullgraph=True, options=options)
    with torch.no_grad():
        for size in (3, 3, 5, 3):
            x, y = torch.rand(size, size) + 3 * torch.eye(size), torch.rand(size, 2)
            torch.testing.assert_close(run(x.npu(), y.npu()).cpu(), solved(x, y), rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="singular"):
            run(torch.zeros(3, 3).npu(), y.npu())
    graph = backend.compiled()[0]
    assert graph.ledger is not None
    assert not graph.ledger.captures
    (reason,) = graph.ledger.uncaptured
    assert reasons.of(reason) is reasons.HOST_EFFECT
    assert "aten._linalg_check_errors.default" in reason
    assert "test_effects.py" in reason
    assert graph.stored == ("not stored: effects are handled around the graph" if cache else "")


def test_effects_happen_at_every_call_in_order() -> None:
    NOTED.clear()
    torch._dynamo.reset()

    def noting(x: Tensor) -> Tensor:
        first = torch.ops.effects_test.note(x)
        torch.ops.effects_test.note(first * 10)  # whose result nobody reads
        return torch.ops.effects_test.note(x * 1.0)

    run = torch.compile(noting, backend=AscendBackend(), fullgraph=True)
    with torch.no_grad():
        for value in (1.0, 2.0, 3.0):
            assert run(torch.full((2,), value).npu()).cpu().tolist() == [value + 1] * 2
    assert NOTED == [2.0, 40.0, 2.0, 4.0, 60.0, 4.0, 6.0, 80.0, 6.0]
