"""Where the project's sources raise, warn or log above INFO: found in their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOUD = {"warn", "warning", "warning_once", "error", "exception", "critical", "add_note"}


def sites(*folders: str) -> set[str]:
    """`file:function`, from the repository's root, of each function that says something to a user."""
    found = set()
    for folder in folders:
        place = ROOT / folder
        for file in [place] if place.suffix else sorted(place.rglob("*.py")):
            for function in _speaking(ast.parse(file.read_text())):
                found.add(f"{file.relative_to(ROOT)}:{function}")
    return found


def _speaking(tree: ast.AST, inside: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name if isinstance(node, ast.FunctionDef) else inside
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield inside
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOUD:
            yield inside
        yield from _speaking(node, name)
