"""Rules written for register_replacement (npugraph_ex, Inductor) in this pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.backend import fingerprint
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.replacements import TorchMatch, from_replacement
from npu_compiler.passes.rewrite import Rule, apply
from tests.passes.lowered import calls, lowered


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu(x: Tensor) -> Tensor:
    return torch.ops.aten.silu.default(x)


GATE = from_replacement("gate", gate, silu, (torch.empty(2, 4),), after=("aten.silu.default",))


def rewritten(rule: Rule, function: Callable[..., object], *args: Any, dynamic: bool = False) -> tuple[Any, PassRecord]:
    program = lowered(function, *args, dynamic=dynamic)
    record = PassRecord("test")
    apply(program.graph, [rule], record)
    program.graph.graph.lint()
    program.graph.recompile()
    return program.graph, record


@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_and_dtypes_other_than_the_examples(dynamic: bool) -> None:
    x = torch.rand(3, 5, 7).double()
    program, record = rewritten(GATE, gate, x, dynamic=dynamic)
    assert calls(program) == ["aten.silu.default"]
    assert [fired.rule for fired in record.fired] == ["gate"]
    if not dynamic:
        torch.testing.assert_close(program(x)[0], gate(x))


def head_and_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.ops.aten.max.dim(x, -1)
    return values.exp(), indices


def by_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, 1)
    return values.squeeze(-1).exp(), indices.squeeze(-1)


def test_several_results() -> None:
    """The second result is no part of the first one's expression: it is found behind the call they share."""
    rule = from_replacement("max", head_and_rest, by_topk, (torch.empty(2, 4),))

    def program(x: Tensor) -> Tensor:
        values, indices = x.max(-1)
        return indices + 1, values.exp() * 2

    x = torch.rand(5, 9)
    module, record = rewritten(rule, program, x)
    assert [fired.rule for fired in record.fired] == ["max"]
    assert "aten.topk.default" in calls(module)
    assert "aten.max.dim" not in calls(module)
    for got, expected in zip(module(x), program(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_numbers_and_sizes_are_checked_with_what_is_found() -> None:
    """A pattern takes any number; the search traced again for the match decides, sizes included."""

    def search(x: Tensor) -> Tensor:
        return (x + 3).view(x.shape[0] * x.shape[1], x.shape[2])

    def replace(x: Tensor) -> Tensor:
        return x.view(-1, x.shape[2]) + 3

    rule = from_replacement("flat", search, replace, (torch.empty(2, 3, 4),))
    for dynamic in (False, True):
        module, _ = rewritten(rule, search, torch.rand(4, 5, 6), dynamic=dynamic)
        assert calls(module)[-2:] == ["aten.view.default", "aten.add.Tensor"]
    _, record = rewritten(rule, lambda x: (x + 4).view(20, 6), torch.rand(4, 5, 6))
    assert [refused.reason for refused in record.refused] == [
        "the numbers or dtypes are not the search's: another call is found"
    ]
    _, record = rewritten(rule, lambda x: (x + 3).view(10, 12), torch.rand(4, 5, 6))
    assert not record.fired


def test_scalar_argument() -> None:
    """scalar_workaround stands for an argument while tracing; the number found reaches the replacement."""

    def search(x: Tensor, scale: float) -> Tensor:
        return (x + 1) * scale

    def replace(x: Tensor, scale: float) -> Tensor:
        return torch.add(x * scale, scale)

    rule = from_replacement("scaled", search, replace, (torch.empty(3),), scalar_workaround={"scale": 0.123})
    x = torch.rand(4)
    module, record = rewritten(rule, lambda x: (x + 1) * 7.5, x)
    assert record.fired, str(record)
    torch.testing.assert_close(module(x)[0], (x + 1) * 7.5)


def test_extra_check_sees_arguments_and_calls() -> None:
    seen: list[TorchMatch] = []

    def wide_enough(match: TorchMatch) -> bool:
        seen.append(match)
        return bool(match.kwargs["x"].meta["val"].shape[-1] % 32 == 0)

    rule = from_replacement("gate", gate, silu, (torch.empty(2, 4),), extra_check=wide_enough)
    _, record = rewritten(rule, gate, torch.rand(3, 8))
    assert [refused.reason for refused in record.refused] == ["the rule's extra_check says no"]
    module, _ = rewritten(rule, gate, torch.rand(3, 64))
    assert calls(module) == ["aten.silu.default"]
    assert [str(node.target) for node in seen[0].nodes] == ["aten.sigmoid.default", "aten.mul.Tensor"]
    assert seen[0].output_node() is seen[0].nodes[-1]


def test_inner_value_that_is_used_elsewhere() -> None:
    def leaks(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.sigmoid(x)
        return x * inner, inner

    _, record = rewritten(GATE, leaks, torch.rand(3))
    assert [refused.reason for refused in record.refused] == ["inner value sigmoid is also used by output"]


def test_enters_the_cache_key_by_content() -> None:
    same = from_replacement("gate", gate, silu, (torch.empty(2, 4),), after=("aten.silu.default",))
    other = from_replacement("gate", gate, lambda x: silu(x) * 1, (torch.empty(2, 4),), after=("aten.silu.default",))
    assert fingerprint({"rules": [GATE]}) == fingerprint({"rules": [same]}) != fingerprint({"rules": [other]})


def test_what_cannot_be_a_rule() -> None:
    with pytest.raises(ValueError, match="2 example inputs are given"):
        from_replacement("gate", gate, silu, (torch.empty(2), torch.empty(2)))
    with pytest.raises(ValueError, match="returns one of its arguments"):
        from_replacement("gate", lambda x: (x, x + 1), silu, (torch.empty(2),))
    constant = torch.rand(2)
    with pytest.raises(ValueError, match="constant tensor"):
        from_replacement("gate", lambda x: x + constant, silu, (torch.empty(2),))


def test_rule_of_npugraph_ex_on_the_device() -> None:
    """One of the wheel's own kind: torch_npu's add + RMS norm followed by a cast, joined into one operator."""
    torch.npu.current_device()

    def search(x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, _, total = torch.ops.npu.npu_add_rms_norm.default(x1, x2, gamma)
        return normed.to(torch.float32), normed, total

    def replace(x1: Tensor, x2: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide, normed, _, total = torch.ops.npu.npu_add_rms_norm_cast.default(x1, x2, gamma)
        return wide, normed, total

    examples = [torch.empty(2, 32, dtype=torch.float16, device="meta") for _ in range(2)]
    rule = from_replacement("cast", search, replace, (*examples, torch.empty(32, dtype=torch.float16, device="meta")))

    def model(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight)
        return normed.float() * 2, normed + total

    args = [torch.rand(4, 64).half().npu(), torch.rand(4, 64).half().npu(), torch.rand(64).half().npu()]
    compiled = torch.compile(model, backend="ascend", options={"rules": [rule], "check": True})
    expected = model(*args)
    for _ in range(3):
        for got, want in zip(compiled(*args), expected, strict=True):
            torch.testing.assert_close(got, want)
