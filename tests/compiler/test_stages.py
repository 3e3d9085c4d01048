"""What a compilation costs, stage by stage, and what watches a first call."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from npu_compiler.aclgraph import modes
from npu_compiler.backend import ascend
from npu_compiler.stages import CAPTURE, FIRST_CALL, LOWERING, ORDER, PASSES, PLAN, Stages


def burn(seconds: float) -> None:
    import time

    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_stage_within_another_counts_for_itself_only() -> None:
    stages = Stages()
    with stages.stage(LOWERING):
        burn(0.05)
        with stages.stage(PLAN):
            burn(0.02)
            with stages.stage(PASSES):
                burn(0.1)
            with stages.stage(PASSES):
                burn(0.1)
    found = {name: cost.cpu for name, cost in stages.costs.items()}
    assert found == {
        LOWERING: pytest.approx(0.05, abs=0.02),
        PLAN: pytest.approx(0.02, abs=0.015),
        PASSES: pytest.approx(0.2, abs=0.02),
    }
    assert stages.after_lowering.cpu == pytest.approx(0.22, abs=0.03)


def test_the_report_tells_the_cost_of_each_stage() -> None:
    x = torch.randn(8, device="npu")
    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend="ascend", fullgraph=True)
    with torch.inference_mode():
        compiled(x)
    newest = ascend.compiled()[-1]
    assert set(newest.stages.costs) == {LOWERING, PLAN, PASSES, ORDER, FIRST_CALL, CAPTURE}
    assert all(cost.cpu > 0 and cost.seconds > 0 for cost in newest.stages.costs.values())
    assert "CPU seconds: lowering" in str(newest)
    before = newest.stages.costs[CAPTURE].cpu
    with torch.inference_mode():
        compiled(x)  # a replay
    assert newest.stages.costs[CAPTURE].cpu == before


def test_nothing_watches_operators_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd's watch of a first call is off for the program's operators and for all that is captured."""
    seen: list[str] = []
    kind = type(next(iter(_modes_of_a_first_call())))
    original = kind.__torch_dispatch__

    def watched(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        seen.append(str(func))
        return original(self, func, types, args, kwargs)

    monkeypatch.setattr(kind, "__torch_dispatch__", watched)
    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend="ascend", fullgraph=True)
    with torch.inference_mode():
        compiled(torch.randn(8, device="npu"))
    assert not [name for name in seen if "relu" in name or "add" in name]


def _modes_of_a_first_call() -> list[TorchDispatchMode]:
    found: list[TorchDispatchMode] = []

    def backend(gm, example_inputs):  # type: ignore[no-untyped-def]
        from npu_compiler.lowering.functional import lower

        def call(*args):  # type: ignore[no-untyped-def]
            found.extend(_get_current_dispatch_mode_stack())
            return made(*args)

        made = None

        def finish(functional):  # type: ignore[no-untyped-def]
            nonlocal made
            made = functional.graph
            return call

        return lower(gm, example_inputs, finish)

    with torch.inference_mode():
        torch.compile(torch.relu, backend=backend, fullgraph=True)(torch.randn(8, device="npu"))
    assert found, "this torch watches no first call any more: aclgraph/modes.py can go"
    return found


def test_a_users_operator_that_returns_its_argument_is_still_found() -> None:
    library = torch.library.Library("stages_test", "FRAGMENT")
    library.define("itself(Tensor x) -> Tensor")
    library.impl("itself", lambda x: x.view(-1), "PrivateUse1")
    library.impl("itself", lambda x: torch.empty_like(x).view(-1), "Meta")
    own = torch.ops.stages_test.itself
    settings = torch._functorch.config.patch(error_on_custom_op_aliasing=False)
    with settings, torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(lambda x: own(x) + 1, backend="ascend", fullgraph=True)(torch.randn(8, device="npu"))
    assert any("stages_test::itself" in str(one.message) for one in caught)


def test_a_users_mode_sees_a_first_call() -> None:
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    graph = torch.fx.symbolic_trace(lambda x: torch.relu(x)).graph
    with Passing() as mode, modes.at_first_call(graph):
        assert _get_current_dispatch_mode_stack() == [mode]
    with Passing(), modes.in_capture():
        assert not _get_current_dispatch_mode_stack()
