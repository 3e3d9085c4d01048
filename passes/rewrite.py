"""Rules, and their application to a program.

A rule is data: what to look for, what to put there, when that is legal, what it saves, what it means, on which program
it fires and on which it must not. One function applies all of them alike, so every rewrite keeps the user's source
line, checks the layout of its results, and notes why it was left out; one test,
tests/passes/test_rules.py, runs them all.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from npu_compiler.errors import NpuCompilerError, RuleError
from npu_compiler.facts.sizes import Fact, contiguous, known, same_layout, same_shape
from npu_compiler.fusion_kernels import register
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import is_pure, storage, tensors, value, written_storages
from npu_compiler.graph.source import raised, where
from npu_compiler.graph.spec import infer
from npu_compiler.graph.traffic import is_view, may_be_view
from npu_compiler.passes.matching import Miss, find
from npu_compiler.passes.pattern import Match, Pattern, root_targets
from npu_compiler.passes.record import PassRecord, Saving

NEAR_MISS = 3
"""A failed attempt that got this many calls deep is worth reporting."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NearMiss:
    """A program on which a rule must not fire.

    Attributes:
        program: a function in plain PyTorch.
        example: makes its arguments, given a dtype; None takes the rule's own example.
        reason: part of the reason that the record must give. Empty only where the match fails before NEAR_MISS calls,
            which leaves no reason behind.
        inference: lowered as vLLM does, under inference_mode, where layer_norm, reshape and matmul stay whole.
        dynamic: no size is known.
    """

    program: Callable[..., object]
    example: Callable[[torch.dtype], tuple[object, ...]] | None = None
    reason: str = ""
    inference: bool = False
    dynamic: bool = False


def always(match: Match) -> Fact:
    """The legality of a rule whose pattern says it all."""
    return known(True, "the pattern says it all")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rewrite.

    How to write one: put the pattern, and what takes its place as either `operator` + `operands` (a fused operator) or
    `replacement` (a function that builds calls); answer legality from facts (npu_compiler.facts), `a & b & c`, so that
    the first part that is not proven gives the reason; give `reference` and `example`, the program before, and `after`,
    the operators the program has afterwards; list near misses, at least one, each one step away from a match. Put the
    rule into the `rules` of a Pass in pipeline.py: the tests then run it, on its example in every dtype, against the
    oracle in float64, and on its near misses.

    Attributes:
        name: for the record, and for `disabled_rules`.
        pattern: what to look for; its root is the last call.
        operator: the fused operator that takes its place: a name in `torch.ops.npu_fused`, or "namespace::name".
        operands: the fused operator's arguments, from a match.
        replacement: builds what takes the pattern's place with `Build` and returns one node for each of `results`.
        results: which bound names the new outputs replace, in order; "root" is the match's root. A name stands for a
            call of the pattern that may be used elsewhere too.
        legal: whether the match may be rewritten; only a proven True allows it.
        cost: what a firing saves, from the match and the new calls. None: counted from the calls that go and come,
            where a fused operator counts as one kernel.
        reference: a function in plain PyTorch that contains the pattern; the test traces and compares it.
        example: makes tensors for `reference`, given a dtype.
        after: the operators of the example's program after the rewrite, in order (getitem and arithmetic on sizes left
            out). Empty: just `operator`.
        near_misses: programs on which the rule must not fire.
        oracle: the meaning of `reference`, for float64 arguments, where `reference` itself can't say it.
        dtypes: what `example` is tested in.
        tolerance: largest error by dtype, as a part of the largest value. None: one rounding of that dtype.
    """

    name: str = field(kw_only=False)
    pattern: Pattern
    operator: str = ""
    operands: Callable[[Match], Sequence[object]] | None = None
    replacement: Callable[[Build, Match], fx.Node | Sequence[fx.Node]] | None = None
    results: tuple[str, ...] = ("root",)
    legal: Callable[[Match], Fact] = always
    cost: Callable[[Match, Sequence[fx.Node]], Saving] | None = None
    reference: Callable[..., object]
    example: Callable[[torch.dtype], tuple[object, ...]]
    after: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    oracle: Callable[..., object] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    tolerance: Mapping[torch.dtype, float] | None = None

    def __post_init__(self) -> None:
        if bool(self.operator) == (self.replacement is not None):
            raise ValueError(f"rule {self.name}: give either operator and operands, or replacement")
        if self.operator and self.operands is None:
            raise ValueError(f"rule {self.name}: operator {self.operator} without operands")


class Build:
    """Adds calls in place of a match: `build(torch.ops.aten.add.Tensor, a, b)`; each gets its fake value and the origin
    of what the match covers. `made` lists them."""

    def __init__(self, graph: fx.Graph, replaces: Sequence[fx.Node], made_by: str) -> None:
        self.made: list[fx.Node] = []
        self._graph, self._replaces, self._made_by = graph, replaces, made_by

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self._graph, target, args, replaces=self._replaces, made_by=self._made_by, kwargs=kwargs)
        self.made.append(node)
        return node

    def unpack(self, node: fx.Node) -> list[fx.Node]:
        """The outputs of a call, one node each."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return [node]
        return [self(operator.getitem, node, index) for index in range(len(value))]

    def undo(self) -> None:
        """Takes the calls out again."""
        for node in reversed(self.made):
            self._graph.erase_node(node)
        self.made.clear()


def apply(module: fx.GraphModule, rules: Iterable[Rule], record: PassRecord) -> None:
    """Applies the rules wherever they match and are legal; the first that fires at a call wins."""
    rules = [rule for rule in rules if rule.name not in record.disabled]
    if rules:
        register()
    anchored: dict[str, list[Rule]] = {}
    for rule in rules:
        for target in root_targets(rule.pattern):
            anchored.setdefault(target, []).append(rule)
    erased: set[fx.Node] = set()
    for root in list(module.graph.nodes):
        for rule in anchored.get(str(root.target), ()):
            if root in erased or record.is_spent:
                break
            match, miss = find(rule.pattern, root)
            if match is None:
                if miss.depth >= NEAR_MISS:
                    record.refuse(rule.name, root, f"matched {miss.depth} calls, then: {miss.reason}")
                record.attempt(rule.name, root, miss)
                continue
            verdict = _rewrite(module.graph, rule, match, record, erased)
            if verdict:
                break
            record.refuse(rule.name, root, verdict.text)
            record.attempt(rule.name, root, Miss(len(match.nodes), verdict.text, whole=True))


def _rewrite(graph: fx.Graph, rule: Rule, match: Match, record: PassRecord, erased: set[fx.Node]) -> Fact:
    """Replaces the match if that is legal; returns whether, and why not. What is refused leaves no trace."""
    present = [name == "root" or name in match.bindings for name in rule.results]  # an Item may go unused
    names = [name for name, used in zip(rule.results, present, strict=True) if used]
    replaced = [match.root if name == "root" else match.node(name) for name in names]
    verdict = _legality(rule, match) & private(match.nodes, replaced)
    if not verdict:
        return verdict
    point = insertion_point(_needed(rule, match), replaced, match.nodes)
    if point is None:
        return known(False, "an operand is computed after a result is first used")
    build = Build(graph, match.nodes, rule.name)
    with graph.inserting_before(point):
        made = _replacement(rule, match, build)
    outputs = [output for output, used in zip(made, present, strict=True) if used]
    verdict = _in_order(build.made, point) & same_layouts(replaced, outputs)
    if not verdict:
        build.undo()
        return verdict
    with _blamed(rule, "cost", match):
        saves = rule.cost(match, build.made) if rule.cost else Saving.between(match.nodes, build.made)
    record.fire(rule.name, match.root, match.nodes, saves, build.made)
    for old, new in zip(replaced, outputs, strict=True):
        old.replace_all_uses_with(new)
    sources = [source for node in match.nodes for source in node.all_input_nodes]
    erased |= erase_unused(graph, match.nodes)
    erased |= _erase_unused_sources(graph, [source for source in sources if source not in erased])
    return verdict


def _legality(rule: Rule, match: Match) -> Fact:
    with _blamed(rule, "legal", match):
        verdict = rule.legal(match)
    if not isinstance(verdict, Fact):
        raise _unusable(rule, "legal", verdict, match, "return a Fact, such as facts.sizes.known(holds, reason)")
    return verdict


@contextlib.contextmanager
def _blamed(rule: Rule, part: str, match: Match) -> Iterator[None]:
    """Whatever a rule's own function raises becomes an error that names the rule, the function and the place."""
    try:
        yield
    except NpuCompilerError:
        raise
    except Exception as error:
        raise RuleError(
            f"rule {rule.name!r}: its {part} failed: {raised(error)}",
            where=where(match.root),
            rule=f"the pattern bound {', '.join(match.bindings) or 'nothing'}",
            fix=f'correct it, or leave it out with options={{"disabled_rules": ["{rule.name}"]}}',
        ) from error


def _unusable(rule: Rule, part: str, found: object, match: Match, fix: str) -> RuleError:
    text = f"rule {rule.name!r}: its {part} returned {type(found).__name__}"
    return RuleError(text, where=where(match.root), rule=f"what passes/rewrite.py says of `{part}`", fix=fix)


def _needed(rule: Rule, match: Match) -> list[object]:
    """What has to be computed before the replacement: its operands, or all that the match binds outside of itself."""
    if rule.operands is not None:
        with _blamed(rule, "operands", match):
            return list(rule.operands(match))
    bound: list[fx.Node] = []
    fx.node.map_arg(tuple(match.bindings.values()), bound.append)
    return [node for node in dict.fromkeys(bound) if node not in match.nodes]


def _replacement(rule: Rule, match: Match, build: Build) -> Sequence[fx.Node]:
    if rule.replacement is not None:
        with _blamed(rule, "replacement", match):
            outputs = rule.replacement(build, match)
        made = [outputs] if isinstance(outputs, fx.Node) else outputs
        if not isinstance(made, Sequence) or not all(isinstance(item, fx.Node) for item in made):
            raise _unusable(rule, "replacement", outputs, match, "return the new node, or one for each of `results`")
        return made
    assert rule.operands is not None, "Rule.__post_init__ checks it"
    namespace, _, name = rule.operator.rpartition("::")
    target = getattr(getattr(torch.ops, namespace or "npu_fused"), name).default
    with _blamed(rule, f"operator {rule.operator}", match):
        fused = build(target, *rule.operands(match))
    return [fused] if isinstance(match.root.meta["val"], tuple) else build.unpack(fused)


def _in_order(made: Sequence[fx.Node], point: fx.Node) -> Fact:
    """Whether the new calls read only what is computed before them."""
    for node in made:
        for source in node.all_input_nodes:
            if source not in made and not source < point:
                return known(False, f"{source.name} is computed after a result is first used")
    return known(True, "everything read is computed before")


def private(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> Fact:
    """Whether nothing but the match itself uses its inner values. An inner view costs nothing to keep, so it may be
    shared; a computed value would be computed twice."""
    inside = set(nodes)
    for node in nodes:
        if node in results or is_view(node):
            continue
        for user in node.users:
            if user not in inside:
                return known(False, f"inner value {node.name} is also used by {user.name}")
    return known(True, "inner values are private")


def insertion_point(
    operands: Sequence[object], results: Sequence[fx.Node], covered: Iterable[fx.Node]
) -> fx.Node | None:
    """The first call outside the match that uses a result, with all operands computed before it; None if one can't be.

    An operand that stands behind that call, but needs nothing the match computes, is moved before it. Where a write
    stands before that call, it is the write instead: the inputs' new values are written at the end of a program, and
    nothing may be read after that (reinplace relies on it too).

    Args:
        covered: the calls of the match, which will be gone.
    """
    gone = set(covered)
    users = [user for result in results for user in result.users if user not in gone]
    point = min(users, default=min(results))
    inputs = [item for item in operands if isinstance(item, fx.Node)]
    if gone.intersection(inputs):
        return None
    if _first_write(min(gone), max(gone), _read_by(gone)) is not None:
        return None
    point = _first_write(max(gone), point) or point
    late = [item for item in inputs if not item < point]
    moves: dict[fx.Node, None] = {}
    if not all(_movable(item, point, gone, moves) for item in late):
        return None
    if moves and _first_write(point, max(moves), _read_by(moves)) is not None:
        return None
    for node in sorted(moves):
        point.prepend(node)
    return point


def _read_by(nodes: Iterable[fx.Node]) -> set[int]:
    """The storages that some calls read."""
    return {storage(tensor) for node in nodes for source in node.all_input_nodes for tensor in tensors(source)}


def _first_write(start: fx.Node, end: fx.Node, storages: set[int] | None = None) -> fx.Node | None:
    """The first call from `start` on and before `end` that writes one of the storages, or any."""
    node = start
    while node < end and node.op != "output":
        written = written_storages(node)
        if written and (storages is None or written & storages):
            return node
        node = node.next
    return None


def _movable(node: fx.Node, point: fx.Node, gone: set[fx.Node], moves: dict[fx.Node, None]) -> bool:
    """Whether `node` can be computed before `point`; adds what has to move for it to `moves`."""
    if node in gone:
        return False
    if node < point or node in moves:
        return True
    if node is point or not is_pure(node):
        return False
    if all(_movable(item, point, gone, moves) for item in node.all_input_nodes):
        moves[node] = None
        return True
    return False


def unpack(graph: fx.Graph, fused: fx.Node, made_by: str) -> list[fx.Node]:
    """The outputs of a fused call, one node each."""
    value = fused.meta["val"]
    if isinstance(value, torch.Tensor):
        return [fused]
    return [
        call(graph, operator.getitem, (fused, index), replaces=[fused], made_by=made_by) for index in range(len(value))
    ]


def same_layouts(old: Sequence[fx.Node], new: Sequence[fx.Node]) -> Fact:
    """Whether each new node's tensors have the shape, dtype and strides of the old node's. A contiguous tensor may also
    take the place of one that is not, where nobody sees the strides: all who read it have results of one layout."""
    verdict = known(True, "no result")
    for before, after in zip(old, new, strict=True):
        pairs = itertools.zip_longest(tensors(before), tensors(after))
        for left, right in pairs:
            if left is None:  # a call with more outputs may take the place of one with fewer, which come first
                break
            layout = same_layout(left, right, f"result {before.name}")
            if not layout and left is value(before) and _strides_unseen(before, right):
                continue
            verdict = verdict & layout
    return verdict if verdict else Fact(verdict.truth, f"{verdict.text}; the rest of the program relies on the old one")


def _strides_unseen(node: fx.Node, new: torch.Tensor) -> bool:
    """Whether all users of a node, given `new` in its place, have results of the layouts they have now."""
    old = value(node)
    assert isinstance(old, torch.Tensor)
    if (
        not contiguous(new, "result")
        or old.dtype != new.dtype
        or old.device != new.device
        or not same_shape(old.shape, new.shape, "shape")
    ):
        return False
    return all(_unaffected(user, node, new) for user in node.users)


def _unaffected(user: fx.Node, node: fx.Node, new: torch.Tensor) -> bool:
    if user.op != "call_function" or may_be_view(user) or not is_pure(user):
        return False
    now, then = list(tensors(user)), list(tensors(infer(user, {node: new})))
    return len(now) == len(then) and all(same_layout(*pair, "result") for pair in zip(now, then, strict=True))


def _erase_unused_sources(graph: fx.Graph, sources: list[fx.Node]) -> set[fx.Node]:
    """Erases what only erased calls used, such as copies that a rule passes by; returns it."""
    gone: set[fx.Node] = set()
    while sources:
        source = sources.pop()
        if source in gone or source.users or source.op != "call_function" or not is_pure(source):
            continue
        sources += source.all_input_nodes
        graph.erase_node(source)
        gone.add(source)
    return gone


def erase_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erases those of `nodes` that nobody uses any more, last first; returns them."""
    gone = set()
    for node in sorted(nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)
            gone.add(node)
    return gone
