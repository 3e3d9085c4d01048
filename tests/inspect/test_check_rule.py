"""`npu-compiler check-rule`: right rules pass; wrong values, wrong programs, wrong misses and failing rules do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from npu_compiler import Rule, cli
from npu_compiler.inspect.check_rule import check_rule, error_of
from npu_compiler.passes.rewrite import NearMiss
from tests.compiler.user_rules import SILU, silu_program


def changed(replacement: Callable[..., Any] = SILU.replacement, **changes: Any) -> Rule:
    return dataclasses.replace(SILU, replacement=replacement, **changes)


TANH = changed(lambda build, match: build(torch.ops.aten.tanh.default, match.bindings["x"]))


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (TANH, "result 0 on npu is wrong by 0."),
        (TANH, "calls ['aten.tanh.default'], and should call ['aten.silu.default']"),
        (changed(lambda build, match: build(match.bindings["y"])), "its replacement failed: KeyError: 'y'"),
        (changed(reference=lambda x: x.sigmoid()), "fired 0 times: the program does not call aten.mul.Tensor"),
        (changed(near_misses=(NearMiss(silu_program),)), "has to leave this program alone, and fired"),
        (changed(near_misses=(NearMiss(SILU.near_misses[0].program, reason="an odd row"),)), "because 'an odd row'"),
    ],
    ids=["values", "program", "failure", "example", "fires", "reason"],
)
def test_what_is_wrong_is_said(rule: Rule, wrong: str) -> None:
    faults = [fault for finding in check_rule(rule) for fault in finding.faults]
    assert any(wrong in fault for fault in faults), faults


def test_the_exit_code_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "tests.compiler.user_rules:SILU"
    assert cli.main(["check-rule", name]) == 0
    assert "near miss other_factor: left alone\n4 of 4 programs are as they should be\n" in capsys.readouterr().out
    assert cli.main(["check-rule", name, "--json"]) == 0
    assert [entry["faults"] for entry in json.loads(capsys.readouterr().out)] == [[]] * 4
    monkeypatch.setattr("tests.compiler.user_rules.SILU", TANH)
    assert cli.main(["check-rule", name]) == 1
    assert "  WRONG: result 0 on npu is wrong by" in capsys.readouterr().out
    assert cli.main(["check-rule", "tests.compiler.user_rules:NOTHING"]) == 2


def test_integers_may_be_a_step_apart_in_few_places() -> None:
    exact = torch.arange(100)
    one = exact.clone()
    one[7] += 1
    assert error_of(one, exact) == 0.0
    assert error_of(exact + 1, exact) == error_of(one + (one == 8), exact) == float("inf")
