"""Where a node comes from: the module path and the source line in the user's model."""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import fx


class Placed(Protocol):
    """What has a place in the user's model: an fx node, or what stands for one."""

    @property
    def name(self) -> str: ...

    @property
    def meta(self) -> dict[str, Any]: ...


PLACES = ("stack_trace", "nn_module_stack")
"""Metadata of a call that say where in the user's model it comes from."""
TIMES = "npu_times"
"""Metadata of a call that stands for as many equal ones, one a layer (graph/layers.py); no entry is one."""
_ROOT = re.compile(r"[LG]\['\w+'\](?:\[[^\]]+\])*\.?")
"""What Dynamo puts before the path: the variable that holds the model, whatever its name, and its key there."""
_CHILD = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_INPUT = re.compile(r"[LG]\['(\w+)'\]([^.]*)$")
"""An input that is no part of a module: a variable, and a key or index in it."""
_INSTALLED = re.compile(r"^.*/(?:site|dist)-packages/")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<text>.*)')


@dataclass(frozen=True)
class Place:
    """A place in the user's model.

    Attributes:
        module: path of the innermost module, such as `model.layers.0.mlp`; empty if unknown, as the rest.
        file, line, function, text: the line of code; `file` as Python names it.
    """

    module: str = ""
    file: str = ""
    line: int = 0
    function: str = ""
    text: str = ""

    @property
    def code(self) -> str:
        """The line of code as `file:line: text`; of an installed package, the file begins with the package."""
        return f"{_INSTALLED.sub('', self.file)}:{self.line}: {self.text}" if self.file else ""

    def __str__(self) -> str:
        return " at ".join(part for part in (self.module, self.code) if part)


def place(node: Placed) -> Place:
    """The place that made `node`: its innermost module, and the innermost line of code."""
    return Place(_module_path(node), *_innermost(node.meta.get("stack_trace") or ""))


@functools.lru_cache(maxsize=256)
def _innermost(trace: str) -> tuple[str, int, str, str]:
    """File, line, function and text of a trace's last frame. Equal layers have equal traces."""
    frames = _FRAME.findall(trace)
    file, line, function, text = frames[-1] if frames else ("", 0, "", "")
    return file, int(line), function, text.strip()


def where(node: Placed) -> str:
    """Module path and source line of `node` in one string, or the node's name where neither is known."""
    return str(place(node)) or f"node {node.name}"


def raised(error: Exception) -> str:
    """An error of a user's own function in one line: what it is, and the user's line that raised it or led to it."""
    own = [
        f" ({_INSTALLED.sub('', frame.f_code.co_filename)}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).split(".")[0] not in ("npu_compiler", "torch", "contextlib")
    ]
    return f"{type(error).__name__}: {error}{own[-1] if own else ''}"


@functools.lru_cache(maxsize=512)
def operator_name(target: object) -> str:
    """What a call calls, as programs and messages name it: `aten.mul.Tensor`, `operator.getitem`."""
    from torch import _ops  # who reads bundles imports this module, and no torch

    if isinstance(target, (_ops.OpOverload, str)):
        return str(target)
    if isinstance(target, _ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    name = f"{target.__module__.removeprefix('_')}.{target.__qualname__}"  # type: ignore[attr-defined]  # a function
    return name.replace("<", "").replace(">", "")  # of a local function or a lambda


def input_name(node: fx.Node) -> str:
    """The name of a dynamo graph's input in the user's terms: `x`, `args[0]`, `layers.0.weight`; the node's own where
    that is not known or it is a size."""
    source = getattr(node, "_dynamo_source", None)
    if source is None or not hasattr(node.meta.get("example_value"), "dtype"):
        return node.name
    found = _INPUT.match(source.name)
    return "".join(found.groups()) if found else _plain(source.name)


def first_use(graph: fx.Graph, inputs: Iterable[fx.Node]) -> str:
    """Where the model first uses one of these inputs; empty where it uses none."""
    users = {user for node in inputs for user in node.users if user.op.startswith("call")}
    return next((where(node) for node in graph.nodes if node in users), "")


def beginning(graph: fx.Graph) -> str:
    """Where the model makes the first call of a graph: what a message names that is about all of it."""
    calls = (node for node in graph.nodes if node.op.startswith("call"))
    return next((str(place(node)) for node in calls if str(place(node))), "")


def lines(node: fx.Node) -> list[tuple[str, int]]:
    """The lines of code, file and number, that led to `node`, outermost first."""
    return [(file, int(line)) for file, line, *_ in _FRAME.findall(node.meta.get("stack_trace") or "")]


def module_paths(node: fx.Node) -> list[str]:
    """The paths of the modules that `node` lies in, outermost first."""
    return list(map(_plain, traced_paths(node.meta)))


def traced_paths(meta: Mapping[str, Any]) -> list[str]:
    """The paths of the modules that a node with this metadata lies in, as Dynamo writes them, outermost first."""
    stack = meta.get("nn_module_stack") or {}
    return [entry[0] for entry in stack.values() if isinstance(entry, tuple) and entry and entry[0]]


def _module_path(node: Placed) -> str:
    entries = reversed((node.meta.get("nn_module_stack") or {}).values())
    return next((_plain(entry[0]) for entry in entries if isinstance(entry, tuple) and entry and entry[0]), "")


@functools.lru_cache(maxsize=1024)
def _plain(path: str) -> str:
    return _CHILD.sub(r"\1", path[found.end() :] if (found := _ROOT.match(path)) else path)


def origin_of(nodes: Iterable[fx.Node], made_by: str) -> dict[str, object]:
    """The metadata of a node that replaces `nodes`: the source of the last one, and the names of all of them.

    Keys that a later pass, the ledger or an inspector reads: `stack_trace`, `nn_module_stack`, and `npu_origin` with
    the pass and the original nodes' names (flattened where a replaced node was itself a replacement).
    """
    nodes = list(nodes)
    names: list[str] = []
    for node in nodes:
        earlier = node.meta.get("npu_origin")
        names += earlier["nodes"] if earlier else [node.name]
    meta: dict[str, object] = {"npu_origin": {"pass": made_by, "nodes": names}}
    if nodes and TIMES in nodes[-1].meta:
        meta[TIMES] = nodes[-1].meta[TIMES]
    for key in PLACES:
        for node in reversed(nodes):
            if node.meta.get(key):
                meta[key] = node.meta[key]
                break
    return meta


@contextlib.contextmanager
def origins_kept(graph: fx.Graph, made_by: str) -> Iterator[None]:
    """While this is open, rewrites that know nothing of our metadata may put calls in the place of others: torch's
    pattern matcher, for example. Each new call gets the origin of the calls that stood in its place; the others keep
    their lines (torch gives that of a replaced call to an argument that takes its place)."""
    before = list(graph.nodes)
    lines = {node: node.meta["stack_trace"] for node in before if "stack_trace" in node.meta}
    yield
    known, left = set(before), set(graph.nodes)
    replaced: dict[fx.Node | None, list[fx.Node]] = {}
    behind: fx.Node | None = None
    for node in before:
        if node in left:
            behind = node
        elif node.target is not operator.getitem:
            replaced.setdefault(behind, []).append(node)
    behind = None
    for node in graph.nodes:
        if node in known:
            behind = node
            node.meta.update({"stack_trace": lines[node]} if node in lines else {})
        elif len({old.meta.get(TIMES, 1) for old in replaced.get(behind, ())}) == 1:
            node.meta.update(origin_of(replaced[behind], made_by) | node.meta)
