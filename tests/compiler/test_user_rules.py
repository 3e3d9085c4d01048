"""A user's own rules and passes: where they go, that they belong to one compilation, and what the cache key sees."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

import npu_compiler
from npu_compiler import Pass, Rule
from npu_compiler.backend import ascend, compile_fx, fingerprint
from npu_compiler.config import Options
from npu_compiler.errors import OptionError, RuleError
from npu_compiler.passes import pipeline
from npu_compiler.passes.pattern import Any as Value
from npu_compiler.passes.pattern import Call, Number
from npu_compiler.passes.record import PassRecord
from tests.compiler import user_rules
from tests.compiler.test_compile_fx import compiled_by
from tests.compiler.user_rules import silu_program


def targets(piece: Any) -> list[str]:
    return [str(node.target) for node in piece.graph.graph.nodes if node.op == "call_function"]


def scale_by(factor: float) -> Rule:
    """x * 1.0, one rule a factor: what an engine with its own scale would add."""

    return Rule(
        "scaled",
        pattern=Call("aten.mul.Tensor", Value("x"), Number("one")),
        replacement=lambda build, match: build(torch.ops.aten.mul.Tensor, match.bindings["x"], factor),
        reference=lambda x: x * 1.5,
        example=lambda dtype: (torch.randn(2, dtype=dtype),),
    )


def test_rule_fires_on_the_device() -> None:
    x = torch.rand(4, 8).to("npu")
    compiled = torch.compile(user_rules.silu_program, backend="ascend", options={"rules": [user_rules.SILU]})
    results = [compiled(x) for _ in range(3)]
    expected = torch.nn.functional.silu(x)
    assert all(torch.equal(result, expected) for result in results)
    assert "fired sigmoid_to_silu (2 nodes, saves 1 kernels and" in npu_compiler.report()


@pytest.mark.parametrize("given", [{"rules": [user_rules.SILU]}, {"rules": ["tests.compiler.user_rules:SILU"]}])
def test_rule_by_value_and_by_name(given: dict[str, Any]) -> None:
    piece = compiled_by(user_rules.silu_program, torch.rand(3), options=given)
    assert targets(piece) == ["aten.silu.default"]


def test_two_compilations_keep_their_own_rules() -> None:
    """Two engines in one process, each with its own scale: neither sees the other's, in either order."""
    x = torch.rand(3)
    for factor in (2.0, 3.0, 2.0):
        piece = compiled_by(lambda x: x * 1.5, x, options={"rules": [scale_by(factor)]})
        torch.testing.assert_close(piece(x)[0], x * factor)
    torch.testing.assert_close(compiled_by(lambda x: x * 1.5, x)(x)[0], x * 1.5)


def test_two_compilations_through_torch_compile() -> None:
    x = torch.rand(3).to("npu")

    def scaled(x: Tensor) -> Tensor:
        return x * 1.5

    first = torch.compile(scaled, backend="ascend", options={"rules": [scale_by(2.0)]})
    second = torch.compile(scaled, backend="ascend", options={"rules": [scale_by(3.0)]})
    for _ in range(3):
        torch.testing.assert_close(first(x), x * 2)
        torch.testing.assert_close(second(x), x * 3)


def relu_rule(**changes: Any) -> Rule:
    fields: dict[str, Any] = {
        "pattern": Call(torch.ops.aten.relu.default, Value("x")),
        "replacement": lambda build, match: build(torch.ops.aten.clamp_min.default, match.bindings["x"], 0),
        "reference": torch.relu,
        "example": lambda dtype: (torch.randn(2, dtype=dtype),),
    }
    return Rule("own_relu", **(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"legal": lambda match: True}, "its legal returned bool\n.*fix: return a Fact"),
        (
            {"legal": lambda match: match.tensor("y").dim() == 2},
            r"its legal failed: KeyError: 'y' \(\S*test_user_rules.py:\d+\)\n.*the pattern bound x",
        ),
        ({"replacement": lambda build, match: None}, "its replacement returned NoneType"),
        ({"replacement": lambda build, match: 1 / 0}, "its replacement failed: ZeroDivisionError"),
        ({"cost": lambda match, made: 1 / 0}, "its cost failed: ZeroDivisionError"),
    ],
)
def test_mistakes_in_a_rule_name_it_and_the_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=re.compile(f"rule 'own_relu': {message}", re.DOTALL)) as caught:
        compiled_by(lambda x: x.relu(), torch.randn(3), options={"rules": [relu_rule(**changes)]})
    assert isinstance(caught.value.inner_exception, RuleError)
    assert "test_user_rules.py" in caught.value.inner_exception.where


def test_rule_for_a_misspelt_operator_is_reported() -> None:
    rule = relu_rule(pattern=Call("aten.rellu.default", Value("x")))
    piece = compiled_by(torch.relu, torch.randn(3), options={"rules": [rule]})
    assert "left out own_relu: the program does not call aten.rellu.default; it calls aten.relu.default" in str(piece)
    piece = compiled_by(torch.relu, torch.randn(3), options={"rules": [relu_rule()]})
    assert targets(piece) == ["aten.clamp_min.default"]


def test_passes_stand_where_they_say() -> None:
    order = pipeline.names(pipeline.selected(Options(passes=("tests.compiler.user_rules:BOTH",))))
    assert order.index("negations") == order.index("dead_code") - 1
    assert order.index("silu") == order.index("swiglu") + 1
    assert "user_rules" not in order, "an empty pass is left out"
    piece = compiled_by(lambda x: x.exp().neg().neg(), torch.rand(3), options={"passes": [user_rules.NEGATIONS]})
    assert targets(piece) == ["aten.exp.default"]
    assert [fired.rule for record in piece.records for fired in record.fired] == ["double_negation", "dead_code"]


def test_passes_in_one_place_keep_the_order_given() -> None:
    entries = [Pass(name, "", lambda module, record: None, after="noop") for name in ("one", "two")]
    entries += [Pass(name, "", lambda module, record: None, before="reinplace") for name in ("three", "four")]
    entries.append(Pass("five", "", lambda module, record: None, before="one"))
    order = pipeline.names(pipeline.selected(Options(passes=tuple(entries))))
    assert order[:4] == ["noop", "five", "one", "two"]
    assert order[order.index("reinplace") - 2 :][:3] == ["three", "four", "reinplace"]


def test_disabled_rules() -> None:
    given = {"rules": [user_rules.SILU], "disabled_rules": ["sigmoid_to_silu"]}
    assert "aten.silu.default" not in targets(compiled_by(user_rules.silu_program, torch.rand(3), options=given))
    piece = compiled_by(
        lambda x: torch.nn.functional.silu(x[..., :4]) * x[..., 4:],
        torch.rand(2, 8),
        options={"disabled_rules": ["swiglu"]},
    )
    assert "npu_fused.silu_mul.default" in targets(piece), "the next rule gets its turn"


def tanh_for_sigmoid(module: fx.GraphModule, record: PassRecord) -> None:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.sigmoid.default):
        node.target = torch.ops.aten.tanh.default


def fails(module: fx.GraphModule, record: PassRecord) -> None:
    raise KeyError("abc")


def test_a_change_that_a_pass_does_not_record_is_noted() -> None:
    own = Pass("swapper", "", tanh_for_sigmoid, before="dead_code")
    piece = compiled_by(lambda x: x.sigmoid(), torch.rand(3), options={"passes": [own]})
    assert targets(piece) == ["aten.tanh.default"]
    assert "fired swapper, which recorded nothing (0 nodes)" in str(piece)
    assert "test_user_rules.py" in str(piece)
    idle = compiled_by(lambda x: x.exp(), torch.rand(3), options={"passes": [own]})
    assert "recorded nothing" not in str(idle)


def test_a_change_that_is_not_recorded_ends_a_pass_that_may_make_none() -> None:
    """As bisecting asks for (PassRecord.most)."""
    module = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Identity()))
    with module.graph.inserting_before(module.graph.output_node()):
        made = module.graph.call_function(torch.ops.aten.sigmoid.default, (next(iter(module.graph.nodes)),))
    module.graph.output_node().args = (made,)
    own = Pass("swapper", "", tanh_for_sigmoid, before="dead_code")
    assert not pipeline.run_pass(own, module, Options(), most=0).fired
    assert made.target is torch.ops.aten.tanh.default


def test_a_pass_that_fails_is_named_with_its_line() -> None:
    own = Pass("mine", "", fails, before="dead_code")
    with pytest.raises(
        BackendCompilerFailed, match=r"pass 'mine' failed: KeyError: 'abc' \(\S*test_user_rules.py:\d+\)"
    ):
        compiled_by(lambda x: x.exp(), torch.rand(3), options={"passes": [own]})


def nothing(module: fx.GraphModule, record: PassRecord) -> None:
    return None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"disabled_rules": ["swigul"]}, "did you mean 'swiglu'?"),
        ({"disabled_rules": ["qk_norm_rope"]}, "it is a pass: name it in disabled_passes"),
        ({"disabled_passes": ["rms_norm"]}, "it is a rule: name it in disabled_rules"),
        ({"disabled_passes": ["layers_once"]}, 'it is an option: {"layers_once": False}'),
        ({"rules": ["tests.compiler.user_rules:SILLU"]}, "can't be imported"),
        ({"rules": ["no_such_module:RULE"]}, "No module named 'no_such_module'"),
        ({"rules": ["SILU"]}, "can't be imported"),
        ({"rules": [user_rules.NEGATIONS]}, "which is no Rule"),
        ({"passes": [user_rules.SILU]}, "which is no Pass"),
        ({"rules": [user_rules.SILU, user_rules.SILU]}, "the name 'sigmoid_to_silu' is taken"),
        ({"rules": [dataclasses.replace(user_rules.SILU, name="swiglu")]}, "rule 'swiglu' exists already"),
        ({"passes": [Pass("mine", "", nothing)]}, "names no place"),
        ({"passes": [Pass("mine", "", nothing, before="noop", after="noop")]}, "names two places"),
        ({"passes": [Pass("mine", "", nothing, before="swigul")]}, "did you mean 'swiglu'?"),
        ({"passes": [Pass("noop", "", nothing, before="swiglu")]}, "the name 'noop' is taken"),
        ({"passes": [Pass("mine", "", rules=(user_rules.SILU,), after="reinplace")]}, "stands behind reinplace"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        compile_fx(fx.GraphModule({}, fx.Graph()), [], given)


def test_fingerprint_follows_the_content_of_rules() -> None:
    """Neither names nor a constant: two rules of one name and other numbers have other keys, equal ones the same."""
    keys = [fingerprint({"rules": [scale_by(factor)]}) for factor in (2.0, 3.0, 2.0)]
    assert keys[0] == keys[2] != keys[1]
    assert fingerprint({"passes": [user_rules.NEGATIONS]}) != fingerprint()
    moved = dataclasses.replace(user_rules.NEGATIONS, before="swiglu")
    assert fingerprint({"passes": [moved]}) != fingerprint({"passes": [user_rules.NEGATIONS]})
    assert fingerprint({"disabled_rules": ["swiglu"]}) != fingerprint()
    by_name, by_value = fingerprint({"rules": ["tests.compiler.user_rules:SILU"]}), {"rules": [user_rules.SILU]}
    assert by_name == fingerprint(by_value)


def test_a_module_with_a_replacement_is_imported_while_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import torch
from npu_compiler.passes.replacements import from_replacement

GATE = from_replacement("gate", lambda x: x * torch.sigmoid(x), torch.ops.aten.silu.default, (torch.empty(2, 4),))
"""
    (tmp_path / "replacement_by_name.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    compiled = torch.compile(silu_program, backend="ascend", options={"rules": ["replacement_by_name:GATE"]})
    x = torch.randn(2, 4).npu()
    torch.testing.assert_close(compiled(x), silu_program(x))
    (graph,) = ascend.compiled()
    assert [fired.rule for record in graph.records for fired in record.fired] == ["gate"]


def test_fingerprint_refuses_what_it_cannot_read() -> None:
    hidden = iter([2.0])
    rule = dataclasses.replace(
        user_rules.SILU, replacement=lambda build, match: build(torch.ops.aten.mul.Tensor, match.root, next(hidden))
    )
    with pytest.raises(OptionError, match=r"hidden, which .*replacement closes over can't enter the cache key"):
        fingerprint({"rules": [rule]})
