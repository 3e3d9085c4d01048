"""Is a rule right? It has to fire on its example, once, in each of its dtypes, and compute there what its reference
computes in float64; and it has to leave its near misses alone, for the reason they name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.config import Options
from npu_compiler.errors import NpuCompilerError
from npu_compiler.inspect.program import Data
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import NearMiss, Rule, apply
from npu_compiler.passes.users import note_idle_rules, rules_of

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Of a rule that names none: a fused operator rounds once where the reference rounds twice, which is one unit in the
last place of the largest value."""
MOST_ROUNDED_APART = 0.02
"""Quantised results may differ by one step where the exact value lies half-way; in few places."""


class Finding(Data):
    """What one program showed about a rule.

    Attributes:
        rule: its name. `program`: the example in a dtype, or a near miss.
        said: what was seen. `faults`: what is wrong; empty where nothing is.
    """

    rule: str
    program: str
    said: str
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.program}: {self.said}", *(f"  WRONG: {fault}" for fault in self.faults)]
        return "\n".join(lines)


def rules_named(names: Sequence[str]) -> tuple[Rule, ...]:
    """The rules that "module:name" means, each a rule or a list of them.

    Raises:
        OptionError: there are no such rules.
    """
    return rules_of(Options(rules=tuple(names)))


def check_rule(rule: Rule) -> Iterator[Finding]:
    """Checks a rule on its example in each of its dtypes, on the device, and on each of its near misses."""
    for dtype in rule.dtypes:
        yield _caught(rule, f"example in {dtype}", functools.partial(on_example, rule, dtype))
    for miss in rule.near_misses:
        yield _caught(rule, f"near miss {miss.program.__name__}", functools.partial(on_near_miss, rule, miss))


def _caught(rule: Rule, program: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except NpuCompilerError as error:  # the rule's own functions failed, or what it put in does not fit
        return Finding(rule=rule.name, program=program, said="the rule failed", faults=(str(error),))


def on_example(rule: Rule, dtype: torch.dtype, devices: Sequence[str] = ("npu",)) -> Finding:
    """Whether a rule fires on its example in `dtype` and keeps its meaning on each of `devices`."""
    torch.manual_seed(1)
    args = rule.example(dtype)
    before = rule.reference(*args)
    program, record = rewritten(rule, rule.reference, args)
    faults = []
    if [fired.rule for fired in record.fired] != [rule.name]:
        faults.append(f"it has to fire once, and fired {len(record.fired)} times{_why(record)}")
    wanted = list(rule.after) or ([_operator(rule)] if rule.operator else [])
    if wanted and calls(written_out(program)) != wanted:
        faults.append(f"the program behind it calls {calls(written_out(program))}, and should call {wanted}")
    wide = tree_map(lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf, args)
    oracle = (rule.oracle or rule.reference)(*wide)
    allowed = {**TOLERANCE, **(rule.tolerance or {})}[dtype]
    largest = 0.0
    for device in devices:
        there = tree_map(lambda leaf: leaf.to(device) if torch.is_tensor(leaf) else leaf, args)  # noqa: B023
        found = written_out(program)(*there)
        for place, results in enumerate(zip(*map(tree_leaves, (found, before, oracle)), strict=True)):
            got, same, exact = results
            faults += [
                f"result {place} on {device} is {got_is}, and the reference's is {is_}"
                for got_is, is_ in ((got.dtype, same.dtype), (got.stride(), same.stride()))
                if got_is != is_
            ]
            error = error_of(got, exact)
            largest = max(largest, error)
            if not error <= allowed:
                faults.append(f"result {place} on {device} is wrong by {error:.2g} of the largest value")
    said = f"error {largest:.2g} of the largest value, {allowed:.2g} allowed"
    return Finding(rule=rule.name, program=f"example in {dtype}", said=said, faults=tuple(faults))


def on_near_miss(rule: Rule, miss: NearMiss) -> Finding:
    """Whether a rule leaves a near miss alone, and says why."""
    record, left = missed(rule, miss)
    faults = [] if left or record.fired else ["it was refused, and changed the program all the same"]
    reasons = [refused.reason for refused in record.refused]
    if record.fired:
        faults.append("it has to leave this program alone, and fired")
    elif miss.reason and not any(miss.reason in reason for reason in reasons):
        faults.append(f"it is not left alone because {miss.reason!r}{_why(record)}")
    elif not miss.reason and reasons:
        faults.append(f"the near miss names no reason, and there is one{_why(record)}")
    said = f"left alone{_why(record)}" if not record.fired else "fired"
    return Finding(rule=rule.name, program=f"near miss {miss.program.__name__}", said=said, faults=tuple(faults))


def missed(rule: Rule, miss: NearMiss) -> tuple[PassRecord, bool]:
    """What a rule did to a near miss, and whether the program is as it was."""
    torch.manual_seed(1)
    with torch.inference_mode(miss.inference):
        args = (miss.example or rule.example)(rule.dtypes[0])
    program = lowered(miss.program, *args, dynamic=miss.dynamic, inference=miss.inference).graph
    before, record = sorted(str(program.graph).splitlines()), PassRecord("rules")
    apply(program, [rule], record)
    return record, sorted(str(program.graph).splitlines()) == before


def rewritten(
    rule: Rule, function: Callable[..., object], args: tuple[Any, ...], **how: Any
) -> tuple[Functional, PassRecord]:
    """The lowered program of `function` after the rule, and what the rule did. `how`: see `lowered`."""
    program = lowered(function, *args, **how)
    record = PassRecord("rules")
    note_idle_rules(program.graph.graph, [rule], record)
    apply(program.graph, [rule], record)
    program.graph.graph.lint()
    written_out(program).recompile()
    return program, record


def written_out(program: Functional) -> fx.GraphModule:
    assert isinstance(program.graph, fx.GraphModule), "equal layers are rolled up behind the passes"
    return program.graph


class _Lowered(Exception):
    """Raised in the place of the program's first run."""


def lowered(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = False, inference: bool = False
) -> Functional:
    """The functional program of `function` called with `args`; one graph, no passes run. The program is not run either:
    it may be one that the device would refuse.

    Args:
        inference: lower as vLLM does, under inference_mode, where F.layer_norm, reshape and matmul stay whole.
    """
    programs: list[Functional] = []

    def stop(*_: object) -> None:
        raise _Lowered

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def finish(functional: Functional) -> Callable[..., Any]:
            programs.append(functional)
            return stop

        return lower(gm, example_inputs, finish)

    torch._dynamo.reset()
    with torch.inference_mode() if inference else torch.no_grad(), contextlib.suppress(_Lowered):
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (program,) = programs
    return program


def calls(module: fx.GraphModule) -> list[str]:
    """The program as the list of its operators, in order; getitem and arithmetic on sizes are left out."""
    return [
        str(node.target)
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase)
    ]


def error_of(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference as a part of the largest value; of integers 0, unless too many are a step away or more."""
    got, exact = got.cpu(), exact.cpu()
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - exact.double()).abs()
    if not got.is_floating_point():
        rounded = difference.max() <= 1 and (difference > 0).double().mean() <= MOST_ROUNDED_APART
        return 0.0 if rounded else float("inf")
    return float(difference.max() / exact.double().abs().max().clamp_min(1e-30))


def _operator(rule: Rule) -> str:
    namespace, _, name = rule.operator.rpartition("::")
    return f"{namespace or 'npu_fused'}.{name}.default"


def _why(record: PassRecord) -> str:
    reasons = dict.fromkeys(refused.reason for refused in record.refused)
    return f": {'; '.join(reasons)}" if reasons else ""
