"""Every rule of every pass: it fires on its example, once, and the result keeps its meaning; it does not fire on its
near misses, and says why."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from npu_compiler.config import Options
from npu_compiler.inspect import check_rule
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.passes.rewrite import DTYPES, NearMiss, Rule, apply
from tests.one_rank import one_rank
from tests.passes.conditions import conditions, unexplained
from tests.passes.lowered import calls, lowered

RULES = list(dict.fromkeys(rule for entry in pipeline.PASSES for rule in entry.rules))


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """Of one rank, for rules about collectives."""
    with one_rank():
        yield


def name(rule: Rule) -> str:
    return rule.name


def needs_vllm(function: Callable[..., object]) -> None:
    if "vllm" in str(getattr(function, "__code__", None) and function.__code__.co_names):
        pytest.importorskip("vllm.ir.ops")


def rewritten(rule: Rule, function: Callable[..., object], args: tuple[Any, ...], **how: Any) -> tuple[Any, PassRecord]:
    """The lowered program of `function` after the rule, and what the rule did."""
    needs_vllm(function)
    return check_rule.rewritten(rule, function, args, **how)


def by_dtype() -> list[Any]:
    return [pytest.param(rule, dtype, id=f"{rule.name}-{dtype}") for rule in RULES for dtype in rule.dtypes]


@pytest.mark.parametrize(("rule", "dtype"), by_dtype())
def test_fires_on_its_example_and_keeps_the_meaning(rule: Rule, dtype: torch.dtype) -> None:
    needs_vllm(rule.reference)
    # On the CPU compositions run, on the device the kernels that it has.
    found = check_rule.on_example(rule, dtype, devices=("cpu", "npu"))
    assert not found.faults, str(found)


def misses() -> list[Any]:
    return [
        pytest.param(rule, miss, id=f"{rule.name}-{miss.program.__name__.strip('_')}-{index}")
        for rule in RULES
        for index, miss in enumerate(rule.near_misses)
    ]


@functools.cache
def missed(rule: Rule, miss: NearMiss) -> PassRecord:
    """What a rule did to a near miss, which is lowered once for all conditions of a pass."""
    return check_rule.missed(rule, miss)[0]


@pytest.mark.parametrize(("rule", "miss"), misses())
def test_leaves_its_near_misses_alone_and_says_why(rule: Rule, miss: NearMiss) -> None:
    needs_vllm(miss.program)
    found = check_rule.on_near_miss(rule, miss)
    assert not found.faults, str(found)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_is_complete(rule: Rule) -> None:
    assert rule.near_misses, "a rule lists programs on which it must not fire"
    assert [other.name for other in RULES].count(rule.name) == 1, "the name is what disabled_rules goes by"


def untested() -> list[Any]:
    return [
        pytest.param(rule, dtype, id=f"{rule.name}-{dtype}")
        for rule in RULES
        for dtype in DTYPES
        if dtype not in rule.dtypes
    ]


@pytest.mark.parametrize(("rule", "dtype"), untested())
def test_is_refused_in_dtypes_that_its_numerics_are_not_tested_in(rule: Rule, dtype: torch.dtype) -> None:
    """Half precision is every rule's; a rule that is not for float32 says why."""
    assert dtype is torch.float32
    _, record = rewritten(rule, rule.reference, rule.example(dtype))
    assert not record.fired, str(record)
    nothing_there = rule.name == "add_rms_norm_cast"  # in float32 nothing is widened
    assert record.refused or nothing_there, "no reason is given"


@pytest.mark.parametrize("entry", [entry for entry in pipeline.PASSES if entry.rules], ids=lambda entry: entry.name)
def test_every_condition_has_a_near_miss(entry: Pass) -> None:
    """Each reason that the legality of a pass's rules may give is the reason of one of its near misses."""
    given = [reason for rule in entry.rules for miss in rule.near_misses for reason in reasons(missed(rule, miss))]
    asked = dict.fromkeys(condition for rule in entry.rules for condition in conditions(rule.legal))
    open_ = unexplained(asked, given)
    assert not open_, open_


def reasons(record: PassRecord) -> list[str]:
    return [refused.reason for refused in record.refused]


def rows(rule: Rule, args: tuple[Any, ...]) -> list[int]:
    """Which arguments have a row for each token: their first dimension is that of a result, or of the first argument
    that has several dimensions."""
    results = [leaf for leaf in tree_leaves(rule.reference(*args)) if torch.is_tensor(leaf)]
    sizes = {leaf.shape[0] for leaf in results if leaf.dim()}
    found = [index for index, arg in enumerate(args) if torch.is_tensor(arg) and arg.dim() and arg.shape[0] in sizes]
    wide = [index for index, arg in enumerate(args) if torch.is_tensor(arg) and arg.dim() > 1]
    return [index for index in found if args[index].dim() > 1] or found or wide[:1]


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_fires_for_any_number_of_rows(rule: Rule) -> None:
    """One program, compiled for dynamic rows, is right for another number of them too."""
    torch.manual_seed(1)
    needs_vllm(rule.reference)
    args = rule.example(rule.dtypes[0])
    records = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def finish(program: Functional) -> Callable[..., Any]:
            pipeline.run_pass(pipeline.PASSES[0], program.graph, Options())  # noop: x[:, 1:] has two slices, one of all
            records.append(PassRecord("rules"))
            apply(program.graph, [rule], records[-1])
            program.graph.recompile()
            return program.graph.forward

        return lower(graph, inputs, finish)

    torch._dynamo.reset()
    run = torch.compile(rule.reference, backend=backend, fullgraph=True)
    dynamic = rows(rule, args)
    more = tuple(torch.cat((arg, arg[:2])) if index in dynamic else arg for index, arg in enumerate(args))
    with torch.no_grad():
        for given in (args, more):
            for index in dynamic:
                torch._dynamo.mark_dynamic(given[index], 0)
            for got, expected in zip(*map(tree_leaves, (run(*given), rule.reference(*given))), strict=True):
                allowed = (rule.tolerance or check_rule.TOLERANCE)[rule.dtypes[0]]
                assert check_rule.error_of(got, expected) <= 4 * allowed
    (record,) = records
    assert [fired.rule for fired in record.fired] == [rule.name], str(record)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_keeps_the_source_line_and_the_saving(rule: Rule) -> None:
    args = rule.example(rule.dtypes[0])
    needs_vllm(rule.reference)
    before = lowered(rule.reference, *args).graph
    names = [node.name for node in before.graph.nodes if node.op == "call_function"]
    program, record = rewritten(rule, rule.reference, args)
    made = [node for node in program.graph.graph.nodes if node.meta.get("npu_origin", {}).get("pass") == rule.name]
    assert made or not Counter(calls(program.graph)) - Counter(calls(before)), "what is new has no origin"
    file = Path(rule.reference.__code__.co_filename).name
    for node in made:
        assert "passes/" in node.meta["stack_trace"]
        assert set(node.meta["npu_origin"]["nodes"]) <= set(names)
    (fired,) = record.fired
    assert f"passes/{file}:" in fired.place
    assert fired.saves is not None
    assert fired.saves.kernels >= 0
    assert fired.saves.bytes >= 0
