"""The conditions that a function of a rule or pass may refuse for, read from its source.

A condition is a question to the facts with a reason, such as `known(x.dim() == 2, f"{x.dim()} dimensions")`, or an
answer that is one; in graph/holders.py, which says in a text why not, each text that a method returns. The reason is
what a record shows, so a test can ask whether some near miss was refused for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TypeGuard

REASON = {
    **{"known": 1, "Fact": 1, "equal": 2, "same_shape": 2, "same_layout": 2, "at_least": 2, "divisible": 2},
    "refuse": 2,
}
"""Functions that give a reason, and the position of its text."""
PACKAGE = "npu_compiler.passes"
TEXTS = "npu_compiler.graph.holders"
"""A module whose methods give reasons as texts."""


@dataclass(frozen=True)
class Condition:
    """A reason that may be given. `pattern`: what its text matches; `text`: as the source has it; `where` that is."""

    pattern: str
    text: str
    where: str

    def explains(self, reason: str) -> bool:
        return re.search(self.pattern, reason, re.DOTALL) is not None


def conditions(function: Callable[..., object]) -> list[Condition]:
    """Of `function` and of everything in the passes that it calls."""
    return [condition for called in _reached(function) for condition in _own(called)]


def unexplained(asked: Iterable[Condition], given: Iterable[str]) -> str:
    """The conditions that none of the reasons given is for, as text; empty if there are none."""
    reasons = list(given)
    open_ = [condition for condition in asked if not any(map(condition.explains, reasons))]
    return "\n".join(f"no near miss is refused for {item.text} ({item.where})" for item in open_)


def _reached(function: Callable[..., object]) -> list[FunctionType]:
    found: dict[FunctionType, None] = {}
    waiting: list[object] = [function]
    while waiting:
        item = waiting.pop()
        item = item.func if isinstance(item, functools.partial) else item
        if isinstance(item, (tuple, dict)):  # a table of functions
            waiting += item.values() if isinstance(item, dict) else item
        elif isinstance(item, type) and _ours(item):
            waiting += [entry for entry in vars(item).values() if _has_source(entry)]
        if not isinstance(item, FunctionType) or item in found or not _ours(item):
            continue
        found[item] = None
        captured = [cell.cell_contents for cell in item.__closure__ or ()]
        waiting += [*(item.__globals__.get(name) for name in _names(item.__code__)), *captured]
    return list(found)


def _has_source(item: object) -> bool:
    """Whether a method is written out; those of a dataclass are not."""
    return isinstance(item, FunctionType) and not inspect.unwrap(item).__code__.co_filename.startswith("<")


def _ours(item: FunctionType | type) -> bool:
    return item.__module__.startswith((PACKAGE, TEXTS, "tests.")) or item.__module__ == "__main__"


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _own(function: FunctionType) -> Iterator[Condition]:
    if function.__name__ == "<lambda>":  # what it calls is looked at; its source can't be cut out of the line around it
        return
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    reasons = [_reason(node) for node in _asked(tree)]
    if function.__module__ == TEXTS and function.__annotations__.get("return") == "str":
        reasons += [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and _is_text(node.value)]
    for reason in reasons:
        place = f"{function.__module__}:{first + reason.lineno - 1}"
        yield Condition(_pattern(reason, place), ast.unparse(reason), place)


def _is_text(node: ast.expr | None) -> TypeGuard[ast.expr]:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and bool(node.value))


def _asked(node: ast.AST) -> Iterator[ast.Call]:
    """The questions whose reason may be reported: not those that are only tested for being true."""
    silent = {ast.If: "test", ast.IfExp: "test"}.get(type(node), "")
    if isinstance(node, (ast.BoolOp, ast.UnaryOp)) or (_name(node) in ("bool", "all", "any")):
        return
    if isinstance(node, ast.Call) and _name(node) in REASON and not _always(node):
        yield node
    for field, child in ast.iter_fields(node):
        if field == silent:
            continue
        for item in child if isinstance(child, list) else [child]:
            if isinstance(item, ast.AST):
                yield from _asked(item)


def _name(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    called = node.func
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _always(node: ast.Call) -> bool:
    """Whether the answer is True, or the reason is another one's text."""
    first = node.args[0]
    handed_on = isinstance(_reason(node), (ast.Attribute, ast.Name))
    empty = isinstance(_reason(node), ast.Constant) and _reason(node).value == ""  # type: ignore[attr-defined]
    return handed_on or empty or ast.unparse(first) in ("True", "Truth.TRUE")


def _reason(node: ast.Call) -> ast.expr:
    return node.args[REASON[_name(node)]]


def _pattern(text: ast.expr, place: str) -> str:
    match text:
        case ast.Constant():
            return re.escape(str(text.value))
        case ast.JoinedStr():
            parts = (re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in text.values)
            return "".join(parts)
        case ast.IfExp():
            return f"{_pattern(text.body, place)}|{_pattern(text.orelse, place)}"
    raise AssertionError(f"{place}: the reason {ast.unparse(text)} is no text to search for")
