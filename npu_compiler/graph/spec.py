"""What holds for a program between two passes, checked.

* Every value is defined once and before its use (fx's own lint), and every call has its fake value.
* Inferring a call again from its arguments' fake values gives the recorded one: shape, strides, dtype, device.
* A result shares memory with an argument if and only if the recorded values say so; liveness and re-inplacing rely on
  it.
* Random draws are as many and in the same order as before the pass, and the inputs that are written are the same (but
  for those that were only copied onto themselves).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.errors import SpecError
from npu_compiler.facts.sizes import equal, expression, same_layout
from npu_compiler.graph.effects import storage, tensors, value, written_storages
from npu_compiler.graph.source import beginning, where
from npu_compiler.graph.traffic import is_view, may_be_view

RULE = "graph/spec.py: what holds for a program between two passes"
_NODE = re.compile(r"Node (?:redefined name )?'?(\w+)")
"""How fx's lint names a node."""


class SpecCheck:
    """Checks a program after each pass; a call that has not changed since its last check is not inferred again."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._seen: dict[fx.Node, Hashable] = {}
        self._draws = _draws(module.graph)
        self._written = _written_inputs(module.graph)
        self._unchanged = _copied_onto_themselves(module.graph)

    def after(self, stage: str, module: fx.GraphModule) -> None:
        """Checks `module` as `stage` (a pass) left it.

        Raises:
            SpecError: names the node, the place and what is wrong with it.
        """
        lint(stage, module.graph)
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._check_value(stage, node)
        draws, written = _draws(module.graph), _written_inputs(module.graph)
        before, now = [name for name, _ in self._draws], [name for name, _ in draws]
        if before != now:
            text = f"random draws were {before} and are {now}"
            raise SpecError(_broke(stage, text), where=_differing(self._draws, draws), rule=RULE, fix=_fix(stage))
        if written.keys() | self._unchanged != self._written.keys() | self._unchanged:
            text = f"written inputs were {sorted(self._written)} and are {sorted(written)}"
            changed = (written.keys() ^ self._written.keys()) - self._unchanged
            places = ", ".join(sorted((written | self._written)[name] for name in changed))
            raise SpecError(_broke(stage, text), where=places, rule=RULE, fix=_fix(stage))
        self._draws, self._written, self._unchanged = draws, written, _copied_onto_themselves(module.graph)

    def _check_value(self, stage: str, node: fx.Node) -> None:
        signature = (node.target, node.args, tuple(node.kwargs.items()), id(value(node)), _storages_in(node))
        if self._seen.get(node) == repr(signature):
            return
        wrong = _wrong_value(node)
        if wrong:
            raise SpecError(
                _broke(stage, f"{node.format_node()}: {wrong}"), where=where(node), rule=RULE, fix=_fix(stage)
            )
        self._seen[node] = repr(signature)


def lint(stage: str, graph: fx.Graph) -> None:
    """Raises SpecError where `stage` (a pass) left a graph that is none: a value used before it is made, say."""
    try:
        graph.lint()
    except RuntimeError as error:
        named = _NODE.findall(str(error))
        node = next((node for node in graph.nodes if node.name in named), None)
        place = beginning(graph) if node is None else where(node)
        text = str(error).splitlines()[0]  # the whole graph follows
        raise SpecError(_broke(stage, text), where=place, rule=RULE, fix=_fix(stage)) from error


def refresh_aliases(graph: fx.Graph) -> None:
    """Brings the recorded values of views and in-place calls up to date. After `a` was replaced by `b`, a view of `a`
    reads `b`; after `index_put` became `index_put_`, its result is its argument: the fake values have to say so."""
    for node in graph.nodes:
        if node.op == "call_function":
            refresh_alias(node)


def refresh_alias(node: fx.Node) -> None:
    """`refresh_aliases` for one call; those in front of it are up to date."""
    if not (may_be_view(node) or _is_in_place(node)):  # whether a reshape views is asked below: its record may be old
        return
    inputs = {storage(tensor) for source in node.all_input_nodes for tensor in tensors(source)}
    if not list(tensors(node)) or any(storage(tensor) not in inputs for tensor in tensors(node)):
        inferred = None if _returns_nothing(node) else infer(node)
        shared = {storage(tensor) for tensor in tree_leaves(inferred) if isinstance(tensor, torch.Tensor)}
        if shared <= inputs:  # a reshape may copy: then the recorded value was right
            node.meta["val"] = inferred


def _is_in_place(node: fx.Node) -> bool:
    """Whether a call writes and its results, if it has any, are what it wrote."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    return all(entry.alias_info is not None for entry in target._schema.returns)


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _broke(stage: str, text: str) -> str:
    return f"pass {stage} broke the program: {text}"


def _fix(stage: str) -> str:
    return f'leave it out with options={{"disabled_passes": ["{stage}"]}}, and correct or report the pass'


def _wrong_value(node: fx.Node) -> str:
    """What is wrong with the recorded value of a call; empty if nothing is."""
    if _returns_nothing(node):
        return "" if value(node) is None else f"it returns nothing, recorded is {value(node)!r}"
    if "val" not in node.meta:
        return "it has no fake value"
    if not isinstance(node.target, torch._ops.OpOverload) and not is_view(node):
        return ""  # a higher-order operator, or arithmetic on sizes
    recorded, inferred = tree_leaves(value(node)), tree_leaves(infer(node))
    if len(recorded) != len(inferred):
        return f"{len(recorded)} results are recorded, {len(inferred)} are inferred"
    inputs = [tensor for source in node.all_input_nodes for tensor in tensors(source)]
    for left, right in zip(recorded, inferred, strict=True):
        wrong = _difference(left, right) or _alias_difference(left, right, inputs)
        if wrong:
            return wrong
    return ""


def infer(node: fx.Node, instead: Mapping[fx.Node, torch.Tensor] | None = None) -> Any:
    """The fake value of a call, inferred from those of its arguments, or from others given `instead`."""
    given = instead or {}

    def value_of(item: Any) -> Any:
        return given[item] if isinstance(item, fx.Node) and item in given else value(item)

    args, kwargs = tree_map(value_of, (node.args, dict(node.kwargs)), is_leaf=lambda item: isinstance(item, fx.Node))
    mode = detect_fake_mode((args, kwargs)) or detect_fake_mode(node.meta.get("val"))
    if mode is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    environment = mode.shape_env
    with mode, torch.no_grad():
        if environment is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        with environment.suppress_guards(), environment.ignore_fresh_unbacked_symbols():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _difference(recorded: Any, inferred: Any) -> str:
    if isinstance(recorded, torch.Tensor) and isinstance(inferred, torch.Tensor):
        if recorded.device.type != inferred.device.type:
            return f"it is recorded on {recorded.device} and inferred on {inferred.device}"
        if free_unbacked_symbols(recorded) or free_unbacked_symbols(inferred):
            same = recorded.dtype == inferred.dtype and recorded.dim() == inferred.dim()
            return "" if same else f"recorded {_short(recorded)}, inferred {_short(inferred)}"
        layout = same_layout(recorded, inferred, "recorded and inferred value")
        return "" if layout else layout.text
    if isinstance(recorded, torch.SymInt) or isinstance(inferred, torch.SymInt):
        sizes = all(isinstance(item, (int, torch.SymInt)) for item in (recorded, inferred))
        same = sizes and expression(recorded) == expression(inferred)
        return "" if same else f"recorded {recorded}, inferred {inferred}"
    return "" if type(recorded) is type(inferred) else f"recorded {recorded!r}, inferred {inferred!r}"


def _alias_difference(recorded: Any, inferred: Any, inputs: list[torch.Tensor]) -> str:
    if not isinstance(recorded, torch.Tensor):
        return ""
    for tensor in inputs:
        says, does = storage(recorded) == storage(tensor), storage(inferred) == storage(tensor)
        if says != does:
            return f"it {'shares' if does else 'does not share'} memory with an argument, the record says otherwise"
    return ""


def _short(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _storages_in(node: fx.Node) -> tuple[int, ...]:
    return tuple(storage(tensor) for source in node.all_input_nodes for tensor in tensors(source))


def _draws(graph: fx.Graph) -> list[tuple[str, str]]:
    """The operators that draw random numbers, in order, and their places."""
    return [(str(node.target), where(node)) for node in graph.nodes if _is_draw(node)]


def _differing(before: list[tuple[str, str]], now: list[tuple[str, str]]) -> str:
    """The place of the first draw that is another one, or that one side lacks."""
    for (old, _), (new, place) in zip(before, now, strict=False):
        if old != new:
            return place
    return max(before, now, key=len)[min(len(before), len(now))][1]


def _is_draw(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _written_inputs(graph: fx.Graph) -> dict[str, str]:
    """Names of the inputs that the program writes, and the places where it first does."""
    return dict(_names_of_written(graph))


def _copied_onto_themselves(graph: fx.Graph) -> set[str]:
    """Names of the inputs whose only write is a copy of themselves, which may go: `x.copy_(x.clone())` becomes one."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    plain = {node for node in copies if _same_elements(*node.args[:2])}
    found = {storage(tensor) for node in plain for tensor in tensors(node)}
    found -= {written for node in graph.nodes if node not in plain for written in written_storages(node)}
    inputs = graph.find_nodes(op="placeholder")
    return {node.name for node in inputs if any(storage(tensor) in found for tensor in tensors(node))}


def _same_elements(one: Any, other: Any) -> bool:
    """Whether two values are the same elements of the same memory, in the same order."""
    left, right = value(one), value(other)
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor) or storage(left) != storage(right):
        return False
    offset = equal(left.storage_offset(), right.storage_offset(), "offset")
    return bool(offset & same_layout(left, right, "layout"))


def _names_of_written(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    written: dict[int, fx.Node] = {}
    for node in graph.nodes:
        for found in written_storages(node):
            written.setdefault(found, node)
    for node in graph.find_nodes(op="placeholder"):
        writer = next((written[storage(tensor)] for tensor in tensors(node) if storage(tensor) in written), None)
        if writer is not None:
            yield node.name, where(writer)
