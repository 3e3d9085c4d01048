"""A user's own rules and passes, put in their places among the built-in ones, for one compilation."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from npu_compiler.config import Options, check_names
from npu_compiler.errors import OptionError
from npu_compiler.passes.pattern import root_targets
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.passes.rewrite import Rule

Wanted = TypeVar("Wanted", Rule, Pass)


def rules_of(options: Options) -> tuple[Rule, ...]:
    """The user's rules, in the order given.

    Raises:
        OptionError: an entry is not a rule, or two have one name.
    """
    return _resolved("rules", options.rules, Rule)


def passes_of(options: Options) -> tuple[Pass, ...]:
    """The user's passes, in the order given.

    Raises:
        OptionError: an entry is not a pass, two have one name, or one does not say where it goes.
    """
    found = _resolved("passes", options.passes, Pass)
    for entry in found:
        if bool(entry.before) == bool(entry.after):
            raise OptionError(
                f"pass {entry.name!r} names {'two places' if entry.before else 'no place'} in the pipeline",
                rule="a user's pass stands `before` or `after` another pass",
                fix='give one of the two, for example Pass(..., before="dead_code")',
            )
    return found


def placed(passes: Sequence[Pass], added: Iterable[Pass], functional_until: str) -> tuple[Pass, ...]:
    """`passes` with each of `added` in its place: in front of the first pass of the name `before`, or behind the last
    of the name `after`; of two in one place, the one that was given first stands first.

    Args:
        functional_until: name of the pass behind which the program writes in place, so that no rule may run there.

    Raises:
        OptionError: a place does not exist, a name is taken, or a pass of rules stands behind `functional_until`.
    """
    order = list(passes)
    behind: dict[str, int] = {}
    for entry in added:
        names = [other.name for other in order]
        if entry.name in names:
            raise _taken("passes", entry.name)
        anchor = entry.before or entry.after
        check_names(f"pass {entry.name!r}: {'before' if entry.before else 'after'}", [anchor], names)
        if entry.before:
            position = names.index(anchor)
        else:
            position = len(names) - names[::-1].index(anchor) + behind.get(anchor, 0)
            behind[anchor] = behind.get(anchor, 0) + 1
        if entry.rules and functional_until in names[:position]:
            raise OptionError(
                f"pass {entry.name!r} has rules and stands behind {functional_until}",
                rule=f"rules match functional programs; {functional_until} puts writes in place",
                fix=f'place it before="{functional_until}" or earlier',
            )
        order.insert(position, entry)
    return tuple(order)


def note_idle_rules(graph: fx.Graph, rules: Iterable[Rule], record: PassRecord) -> None:
    """Notes each rule whose operator the program does not call: a misspelt name would go unnoticed."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    for rule in rules:
        wanted = root_targets(rule.pattern)
        if wanted and not wanted & called and rule.name not in record.disabled:
            near = difflib.get_close_matches(min(wanted), called, n=1)
            hint = f"; it calls {near[0]}" if near else ""
            record.refuse_all(rule.name, f"the program does not call {' or '.join(sorted(wanted))}{hint}")


Shape: TypeAlias = list[tuple[fx.Node, object, list[fx.Node]]]


def shape_of(graph: fx.Graph) -> Shape:
    """The calls of a program with what they call and read."""
    return [(node, node.target, node.all_input_nodes) for node in graph.nodes if node.op != "placeholder"]


def note_unrecorded(before: Shape, graph: fx.Graph, record: PassRecord) -> None:
    """Notes that a user's pass changed a program, where it recorded no rewrite itself (PassRecord.fire)."""
    after = shape_of(graph)
    if after != before:
        old, new = ({node: rest for node, *rest in shape} for shape in (before, after))
        gone = [node for node in old if node not in new]
        made = [node for node, rest in new.items() if old.get(node) != rest]
        record.fire(
            f"{record.name}, which recorded nothing", (made or gone or [graph.output_node()])[0], gone, made=made
        )


def with_rules(passes: Sequence[Pass], name: str, rules: tuple[Rule, ...]) -> tuple[Pass, ...]:
    """`passes` with `rules` in the pass called `name`; without that pass if there are none."""
    filled = (dataclasses.replace(entry, rules=rules) if entry.name == name else entry for entry in passes)
    return tuple(entry for entry in filled if entry.name != name or rules)


def _resolved(option: str, given: Iterable[Any], kind: type[Wanted]) -> tuple[Wanted, ...]:
    found: list[Wanted] = []
    for item in given:
        value = _imported(option, item) if isinstance(item, str) else item
        several = value if isinstance(value, (list, tuple)) else [value]
        for entry in several:
            if not isinstance(entry, kind):
                raise OptionError(
                    f"option {option} holds {entry!r:.80}, which is no {kind.__name__}",
                    rule=f"{option} is a list of {kind.__name__} values, or of names 'module:attribute' of such",
                    fix="see docs/passes.md",
                )
            if entry.name in [other.name for other in found]:
                raise _taken(option, entry.name)
            found.append(entry)
    return tuple(found)


def _imported(option: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        with unset_fake_temporarily(), tracing(None):  # a module makes real tensors, whatever is compiled meanwhile
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"option {option}: {name!r} can't be imported: {error}",
            rule="a name is 'module:attribute', and the module is importable where the compiler runs",
            fix="correct the name, or put the module on PYTHONPATH of every process that compiles",
        ) from error


def _taken(option: str, name: str) -> OptionError:
    return OptionError(
        f"option {option}: the name {name!r} is taken", rule="names are used once", fix="choose another name"
    )
