"""Rules written for npugraph_ex or Inductor (`register_replacement`), as rules of this pipeline.

Such a rule is two functions, what to search and what to put there, and example inputs::

    def search(x1, x2, gamma):
        normed, _, total = torch.ops.npu.npu_add_rms_norm.default(x1, x2, gamma)
        return normed.to(torch.float32), total

Both are traced with torch's own tracer. The traced search becomes a pattern that takes any number, list and dtype, as
Inductor's does; a match is legal if the search, traced again with the values found, is exactly what was matched, and
`extra_check` agrees. The replacement is traced with the values found too, and its calls are put into the program.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any as Anything

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler.facts.sizes import Fact, known
from npu_compiler.graph.effects import value
from npu_compiler.passes import noop
from npu_compiler.passes.matching import find
from npu_compiler.passes.pattern import Any, Call, Exactly, Match, Number, Pattern, Size, Together
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import Build, NearMiss, Rule

Function = Callable[..., Anything]


@dataclass(frozen=True)
class TorchMatch:
    """What `extra_check` gets: the part of torch's Match that rules for npugraph_ex read.

    Attributes:
        kwargs: the search function's arguments by name. `nodes`: the calls that were matched, in order.
    """

    kwargs: Mapping[str, Anything]
    nodes: Sequence[fx.Node]
    outputs: Sequence[fx.Node]

    def output_nodes(self) -> list[fx.Node]:
        """The calls whose results the search function returns."""
        return list(self.outputs)

    def output_node(self) -> fx.Node:
        """The first of them."""
        return self.outputs[0]


def from_replacement(
    name: str,
    search_fn: Function,
    replace_fn: Function,
    example_inputs: Sequence[Anything],
    *,
    extra_check: Callable[[TorchMatch], bool] | None = None,
    scalar_workaround: Mapping[str, float] | None = None,
    after: Sequence[str] = (),
    near_misses: Sequence[NearMiss] = (),
) -> Rule:
    """A rule from the arguments of `register_replacement`.

    Args:
        name: for the record and for `disabled_rules`.
        example_inputs: tensors (fake ones too), one for each argument of `search_fn` that `scalar_workaround` does not
            name. `scalar_workaround`: values that stand for number arguments while tracing, as in torch.
        extra_check: looks at a match and says whether it may be replaced.
        after, near_misses: see Rule; for tests.

    Raises:
        ValueError: the search function can't be a pattern; it says why.
    """
    loader = _Loader(name, search_fn, replace_fn, dict(scalar_workaround or {}), extra_check)
    arguments = loader.arguments(example_inputs)
    with _mode_of(arguments):
        searched = _traced(search_fn, [_faked(item) for item in arguments])
    pattern, results = loader.pattern(searched, exact=False)
    return Rule(
        name,
        pattern=pattern,
        replacement=loader.replace,
        results=results,
        legal=loader.legal,
        reference=search_fn,
        example=_Example(tuple(item.to("meta") if isinstance(item, torch.Tensor) else item for item in arguments)),
        after=tuple(after),
        near_misses=tuple(near_misses),
        dtypes=(next(item.dtype for item in arguments if isinstance(item, torch.Tensor)),),
    )


@dataclass(frozen=True)
class _Example:
    """The example inputs of a rule, kept as shapes and dtypes; random numbers at each call, in the rule's own dtype."""

    arguments: tuple[Anything, ...]

    def __call__(self, dtype: torch.dtype) -> tuple[Anything, ...]:
        return tuple(
            torch.randn(item.shape).to(item.dtype) if isinstance(item, torch.Tensor) else item
            for item in self.arguments
        )


@dataclass(frozen=True)
class _Loader:
    """The two functions of a rule, read where a match needs them."""

    name: str
    search: Function
    replacement: Function
    scalars: dict[str, float]
    extra_check: Callable[[TorchMatch], bool] | None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(inspect.signature(self.search).parameters))

    def arguments(self, examples: Sequence[Anything]) -> list[Anything]:
        """The examples, with the scalars in their places."""
        rest = iter(examples)
        found = [self.scalars[name] if name in self.scalars else next(rest, None) for name in self.names]
        if any(item is None for item in found) or next(rest, None) is not None:
            raise ValueError(
                f"rule {self.name}: search_fn takes {self.names}, {len(examples)} example inputs are given"
            )
        return found

    def pattern(self, traced: fx.GraphModule, *, exact: bool) -> tuple[Pattern, tuple[str, ...]]:
        """The pattern of a traced search, and the bound names of what it returns."""
        return _Reader(self, traced.graph, exact).read()

    def legal(self, match: Match) -> Fact:
        """Whether the search, traced with what was found, is what was matched, and the rule's own check agrees."""
        missing = [name for name in self.names if name not in match.bindings]
        if missing:
            return known(False, f"argument {missing[0]} of the search is not in the match")
        found = [match.bindings[name] for name in self.names]
        try:
            exact, results = self.pattern(_traced_at(self.search, found), exact=True)
            _traced_at(self.replacement, found)
        except RuntimeError as error:
            return known(False, f"the rule can't be traced for these tensors: {str(error).splitlines()[0]}")
        again, miss = find(exact, match.root)
        if again is None or set(again.nodes) != set(match.nodes):
            return known(False, f"the numbers or dtypes are not the search's: {miss.reason or 'another call is found'}")
        if self.extra_check is not None:
            outputs = [again.node(name) for name in results]
            agreed = self.extra_check(TorchMatch(dict(zip(self.names, found, strict=True)), match.nodes, outputs))
            return known(bool(agreed), "the rule's extra_check says no")
        return known(True, "the search function gives these calls")

    def replace(self, build: Build, match: Match) -> list[fx.Node]:
        """The calls of the replacement, in place of the match."""
        found = [match.bindings[name] for name in self.names]
        graph = _traced_at(self.replacement, found).graph
        made: dict[fx.Node, Anything] = dict(zip(graph.find_nodes(op="placeholder"), found, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
                made[node] = build(node.target, *args, **kwargs)
        return [made[output] for output in _outputs(graph)]


class _Reader:
    """Turns a traced search into a pattern."""

    def __init__(self, loader: _Loader, graph: fx.Graph, exact: bool) -> None:
        self._name, self._exact, self._graph = loader.name, exact, graph
        self._arguments = dict(zip(graph.find_nodes(op="placeholder"), loader.names, strict=True))
        self._scalars = {number: name for name, number in loader.scalars.items()}
        self._seen: set[fx.Node] = set()

    def read(self) -> tuple[Pattern, tuple[str, ...]]:
        outputs = _outputs(self._graph)
        if len(set(outputs)) != len(outputs) or any(node.op != "call_function" for node in outputs):
            raise ValueError(f"rule {self._name}: the search returns one of its arguments, or one result twice")
        patterns = [self._node(node) for node in outputs]
        results = tuple(_bound(node) for node in outputs)
        return (patterns[0] if len(patterns) == 1 else Together(tuple(patterns))), results

    def _node(self, node: fx.Node) -> Pattern:
        if node in self._arguments:
            return Any(self._arguments[node])
        if not isinstance(value(node), (torch.Tensor, tuple, list)):
            return Size(value(node)) if self._exact else Any("")
        if node.op != "call_function":
            raise ValueError(
                f"rule {self._name}: the search has a constant tensor ({node.name}); pass it as an argument"
            )
        if node in self._seen:
            return Any(_bound(node))
        self._seen.add(node)
        if node.target is operator.getitem:  # which of several results is never left open
            return Call(str(node.target), self._node(node.args[0]), Exactly(node.args[1]), name=_bound(node))
        return Call(str(node.target), *(self._argument(item) for item in _given(node)), name=_bound(node))

    def _argument(self, item: Anything) -> Anything:
        if isinstance(item, fx.Node):
            return self._node(item)
        if isinstance(item, (list, tuple)) and any(isinstance(part, fx.Node) for part in item):
            tensors = any(isinstance(value(part), torch.Tensor) for part in item)
            return [self._argument(part) for part in item] if tensors or self._exact else Any("")
        if isinstance(item, (int, float)) and not isinstance(item, bool) and item in self._scalars:
            return Number(self._scalars[item])
        if self._exact and isinstance(item, (list, tuple)):
            return [self._argument(part) for part in item]
        if self._exact and isinstance(item, int) and not isinstance(item, bool):
            return Size(item)
        loose = isinstance(item, (int, float, list, tuple, torch.device, torch.dtype)) and not isinstance(item, bool)
        return Any("") if loose and not self._exact else Exactly(item)


def _bound(node: fx.Node) -> str:
    return f"call {node.name}"


def _given(node: fx.Node) -> list[Anything]:
    """The arguments in schema order, up to the last that is not at its default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    defaults = [item.default_value if item.has_default_value() else None for item in node.target._schema.arguments]
    names = [item.name for item in node.target._schema.arguments]
    values = [
        *node.args,
        *(node.kwargs.get(name, defaults[len(node.args) + i]) for i, name in enumerate(names[len(node.args) :])),
    ]
    while values and not isinstance(values[-1], fx.Node) and values[-1] == defaults[len(values) - 1]:
        if not node.target._schema.arguments[len(values) - 1].has_default_value():
            break
        values.pop()
    return values


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (returned,) = graph.output_node().args
    return [node for node in (returned if isinstance(returned, (list, tuple)) else [returned]) if node is not None]


def _traced_at(function: Function, found: Sequence[Anything]) -> fx.GraphModule:
    """`function` traced with the fake values of what was found in a program."""
    values = [value(item) for item in found]
    with _mode_of(values):
        return _traced(function, values)


def _traced(function: Function, values: Sequence[Anything]) -> fx.GraphModule:
    """The calls of `function` as the lowering leaves them, without those that do nothing or that nobody needs."""
    with torch.no_grad():
        traced = make_fx(function)(*values)
    noop.run(traced, PassRecord(noop.NAME))
    traced.graph.eliminate_dead_code()
    return traced


def _mode_of(values: Sequence[Anything]) -> FakeTensorMode:
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


def _faked(item: Anything) -> Anything:
    return torch.empty_like(item) if isinstance(item, torch.Tensor) else item
