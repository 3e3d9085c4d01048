"""Rules, and their application to a program.

A rule is data: what to look for, what to put there, when that is legal. One function applies all of them alike, so
every rewrite keeps the user's source line, checks the layout of its results, and notes why it was left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from npu_compiler.facts.sizes import Fact, known, same_layout
from npu_compiler.graph.build import call
from npu_compiler.graph.effects import is_pure, tensors
from npu_compiler.passes.pattern import Match, Pattern, find, root_targets
from npu_compiler.passes.record import PassRecord

NEAR_MISS = 3
"""A failed attempt that got this many calls deep is worth reporting."""


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: for the record.
        pattern: what to look for; its root is the last call.
        operator: the fused operator of `torch.ops.npu_fused` that takes its place.
        operands: the fused operator's arguments, from a match.
        results: which bound names the fused operator's outputs replace, in order; "root" is the match's root. A name
            stands for a call of the pattern that may be used elsewhere too.
        legal: whether the match may be rewritten; only a proven True allows it.
        reference: a function in plain PyTorch that contains the pattern; the test traces and compares it.
        example: makes tensors for `reference`, given a dtype.
    """

    name: str
    pattern: Pattern
    operator: str
    operands: Callable[[Match], Sequence[object]]
    results: tuple[str, ...]
    legal: Callable[[Match], Fact]
    reference: Callable[..., object]
    example: Callable[[torch.dtype], tuple[object, ...]]


def apply(module: fx.GraphModule, rules: Iterable[Rule], record: PassRecord) -> None:
    """Applies the rules wherever they match and are legal; the first that fires at a call wins."""
    graph = module.graph
    anchored = [(rule, root_targets(rule.pattern)) for rule in rules]
    erased: set[fx.Node] = set()
    for root in list(graph.nodes):
        for rule, targets in anchored:
            if root in erased or str(root.target) not in targets:
                continue
            match, miss = find(rule.pattern, root)
            if match is None:
                if miss.depth >= NEAR_MISS:
                    record.refuse(rule.name, root, f"matched {miss.depth} calls, then: {miss.reason}")
                continue
            if _rewrite(graph, rule, match, record, erased):
                break


def _rewrite(graph: fx.Graph, rule: Rule, match: Match, record: PassRecord, erased: set[fx.Node]) -> bool:
    replaced = [match.root if name == "root" else match.node(name) for name in rule.results]
    verdict = rule.legal(match)
    verdict = verdict & private(match.nodes, replaced)
    operands = rule.operands(match) if verdict else ()
    point = insertion_point(operands, replaced, match.nodes)
    if verdict and point is None:
        verdict = known(False, "an operand is computed after a result is first used")
    if not verdict:
        record.refuse(rule.name, match.root, verdict.text)
        return False
    with graph.inserting_before(point):
        target = getattr(torch.ops.npu_fused, rule.operator).default
        fused = call(graph, target, operands, replaces=match.nodes, made_by=rule.name)
        outputs = [fused] if isinstance(match.root.meta["val"], tuple) else unpack(graph, fused, rule.name)
    layout = same_layouts(replaced, outputs)
    if not layout:
        record.refuse(rule.name, match.root, f"{layout.text}; the rest of the program relies on the old one")
        for node in dict.fromkeys([*outputs, fused]):
            graph.erase_node(node)
        return False
    record.fire(rule.name, match.root, list(match.nodes))
    for old, new in zip(replaced, outputs, strict=True):
        old.replace_all_uses_with(new)
    erased |= erase_unused(graph, match.nodes)
    return True


def private(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> Fact:
    """Whether nothing but the match itself uses its inner values. An inner view costs nothing to keep, so it may be
    shared; a computed value would be computed twice."""
    inside = set(nodes)
    for node in nodes:
        if node in results or _is_view(node):
            continue
        for user in node.users:
            if user not in inside:
                return known(False, f"inner value {node.name} is also used by {user.name}")
    return known(True, "inner values are private")


def insertion_point(
    operands: Sequence[object], results: Sequence[fx.Node], covered: Iterable[fx.Node]
) -> fx.Node | None:
    """The first call outside the match that uses a result, with all operands computed before it; None if one can't be.

    An operand that stands behind that call, but needs nothing the match computes, is moved before it.

    Args:
        covered: the calls of the match, which will be gone.
    """
    gone = set(covered)
    users = [user for result in results for user in result.users if user not in gone]
    point = min(users, default=min(results))
    inputs = [item for item in operands if isinstance(item, fx.Node)]
    if gone.intersection(inputs):
        return None
    late = [item for item in inputs if not item < point]
    moves: dict[fx.Node, None] = {}
    if not all(_movable(item, point, gone, moves) for item in late):
        return None
    for node in sorted(moves):
        point.prepend(node)
    return point


def _movable(node: fx.Node, point: fx.Node, gone: set[fx.Node], moves: dict[fx.Node, None]) -> bool:
    """Whether `node` can be computed before `point`; adds what has to move for it to `moves`."""
    if node < point or node in moves:
        return True
    if node in gone or node is point or not is_pure(node):
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
    """Whether each new node's tensors have the shape, dtype and strides of the old node's."""
    verdict = known(True, "no result")
    for before, after in zip(old, new, strict=True):
        for left, right in zip(tensors(before), tensors(after), strict=True):
            verdict = verdict & same_layout(left, right, f"result {before.name}")
    return verdict


def erase_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erases those of `nodes` that nobody uses any more, last first; returns them."""
    gone = set()
    for node in sorted(nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)
            gone.add(node)
    return gone


def _is_view(node: fx.Node) -> bool:
    """Whether a call only looks at memory in another way (split and getitem included)."""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return bool(returns) and all(entry.alias_info is not None for entry in returns)
