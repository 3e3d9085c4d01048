"""Compiled programs on disk: a warm start skips everything behind Dynamo.

An entry's key is the hash of everything that decides what the compiler makes of a graph, kept part by part: the graph,
its inputs, each option, the passes, the sources, the versions, the device. So a miss can say which part differed from
the nearest entry (`npu-compiler explain-miss`). A file that is damaged, or was written for other sizes, is a miss that
says so, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from npu_compiler.errors import OptionError
from npu_compiler.fusion_kernels import register
from npu_compiler.graph import serialized
from npu_compiler.graph.around import Around
from npu_compiler.graph.content import of_content
from npu_compiler.graph.digest import of_text
from npu_compiler.graph.effects import storage
from npu_compiler.graph.rolled import Rolled
from npu_compiler.graph.serialized import NotStorable
from npu_compiler.graph.source import where
from npu_compiler.passes.record import PassRecord

FOLDER = "NPU_COMPILER_CACHE"
"""Environment variable with the folder; without it, `npu_compiler` in the user's cache folder ($XDG_CACHE_HOME)."""
LIMIT = 1 << 30
"""Bytes that entries may take together; the least recently used go first."""
HASHED = {
    "graph": "it is another graph: the function, or how Dynamo traced it, changed",
    "passes": "the passes changed: their order, or the content of your own rules and passes",
    "sources": "the compiler's sources changed",
}
"""Parts of a key that are hashes, and what it means that one differs."""
OWN = ("rule ", "pass ")
"""How the parts begin that are hashes of a user's own rules and passes."""
KEYED = ("torch", "torch_npu", "npu_compiler")
"""Packages of which the key holds the version or the sources as a whole."""
LITERALS = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
"""Functions that make a tensor of numbers that stand in the user's code."""
MAGIC = b"npu_compiler program 5\n"


@dataclass(frozen=True)
class Program:
    """What is stored of a compiled graph.

    Attributes:
        graph: the program after the passes. `stable`: see lowering.functional.Functional.
        records: what the passes did, for the report.
        guards: what lowering and passes assumed about sizes, which holds for every caller.
        around: what is done around it at each call.
    """

    graph: fx.GraphModule | Rolled
    stable: tuple[int, ...]
    records: list[PassRecord]
    guards: tuple[sympy.Basic, ...]
    around: Around


@dataclass(frozen=True)
class CacheNote:
    """What the cache did for a compiled graph, for a bundle.

    Attributes:
        text: as CompiledGraph.stored.
        key: what decides about the result, part by part.
        missed: what differed from the nearest program that was stored before.
    """

    text: str
    key: Mapping[str, str]
    missed: tuple[str, ...]


def folder() -> Path:
    """Where entries lie."""
    given = os.environ.get(FOLDER)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "npu_compiler"


class ProgramCache:
    """The entries of one folder."""

    def __init__(self, place: Path, limit: int = LIMIT) -> None:
        self._place = place
        self._limit = limit

    def load(self, parts: Mapping[str, str], inputs: Sequence[Any]) -> Program | str:
        """The stored program for these parts, or why there is none; `inputs` as `read` takes them."""
        file = self._file(parts)
        try:
            data = file.read_bytes()
        except OSError:
            return "not stored"
        program = read(data, inputs)
        if isinstance(program, Program):
            os.utime(file)
        return program

    def store(self, name: str, parts: Mapping[str, str], program: Program) -> list[str]:
        """Writes an entry with the reason why it was not there (`explain`), which it returns, and drops the oldest ones
        above the limit.

        Raises:
            NotStorable: see `write`.
        """
        data = write(program)
        missed = self.explain(parts)
        file = self._file(parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"name": name, "parts": dict(parts), "missed": missed, "stored": time.time()}
        _write(file, data)
        _write(file.with_suffix(".json"), json.dumps(about, indent=1).encode())
        self._drop_oldest()
        return missed

    def explain(self, parts: Mapping[str, str]) -> list[str]:
        """What differs between `parts` and the entry that is nearest to it, a line each."""
        entries = [about["parts"] for about in reversed(self.entries())]  # of equally near ones the newest
        if not entries:
            return ["nothing is stored yet"]
        nearest = min(entries, key=lambda other: len(_differing(other, parts)))
        differing = _differing(nearest, parts)
        own = [part for part in differing if part.startswith(OWN)]
        return [
            line
            for part in differing
            if not (part == "passes" and own)  # these say more
            for line in _difference(part, nearest.get(part), parts.get(part))
        ]

    def entries(self) -> list[dict[str, Any]]:
        """What is stored, oldest first: name, parts, why it had been missed, when it was stored."""
        found = []
        for file in self._place.glob("*/*.json"):
            try:
                found.append(json.loads(file.read_text()))
            except (OSError, ValueError):  # dropped or damaged meanwhile
                continue
        return sorted(found, key=lambda about: about["stored"])

    def _file(self, parts: Mapping[str, str]) -> Path:
        key = of_text(*sorted(parts.items()))
        return self._place / key[:2] / f"{key}.program"

    def _drop_oldest(self) -> None:
        files = sorted(self._place.glob("*/*.program"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self._limit:
                file.unlink(missing_ok=True)
                file.with_suffix(".json").unlink(missing_ok=True)


def write(program: Program) -> bytes:
    """A program as bytes that `read` knows to be whole.

    Raises:
        NotStorable: it holds what no other process knows (graph/serialized.py).
    """
    rest = pickle.dumps((program.stable, program.records, program.guards, program.around))
    body = pickle.dumps((serialized.dumps(program.graph), rest))
    return MAGIC + hashlib.sha256(body).digest() + body


def read(data: bytes, inputs: Sequence[Any]) -> Program | str:
    """What `write` wrote, for callers with these inputs (fake tensors and sizes); or why it can't be used.

    The guards of the stored program become guards of the inputs' shape environment.
    """
    head = len(MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(MAGIC) or hashlib.sha256(data[head:]).digest() != data[len(MAGIC) : head]:
        return "the stored file is damaged or of another version"
    graph, rest = pickle.loads(data[head:])
    stable, records, guards, around = pickle.loads(rest)
    environment = next((item.node.shape_env for item in inputs if isinstance(item, torch.SymInt)), None)
    for guard in guards:
        if environment is None or not environment.evaluate_expr(guard):
            return f"it was compiled for sizes with {guard}"
    register()
    try:
        return Program(serialized.loads(graph, inputs), stable, records, guards, around)
    except AttributeError as missing:  # how torch.ops says that there is no such operator
        return f"an operator of the stored program is not there: {missing}"


def graph_parts(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, str] | str:
    """What a dynamo graph and its inputs add to the key; or why it has none."""
    lines, constants = [], {}
    for node in gm.graph.nodes:
        try:
            target = _target(node)
        except (NotStorable, OptionError) as reason:
            return f"{getattr(reason, 'what', reason)} ({where(node)})"
        given = f"{node.args!r} {node.kwargs!r}"
        if node.target in LITERALS and not node.all_input_nodes:
            constants[f"constant {node.name}"] = f"{node.target.__name__} {given}"
            given = ""
        lines.append(f"{node.name} = {node.op} {target} {given}")
    state = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("npu"),
    }
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    owners: dict[int, int] = {}
    for index, value in enumerate(tensors):
        owners.setdefault(storage(value), index)
    return {
        **constants,
        "graph": of_text(*lines),
        "inputs": "; ".join(
            _described(value, symbolic, owners)
            for value, symbolic in zip(example_inputs, symbolic_inputs(gm, example_inputs), strict=True)
        ),
        "state": ", ".join(f"{name} {value}" for name, value in state.items()),
    }


def symbolic_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a dynamo graph as it traced them: fake tensors whose dynamic sizes are symbols."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]


def guards_since(environment: ShapeEnv | None, count: int) -> tuple[sympy.Basic, ...]:
    """The guards a shape environment got after its first `count`."""
    return () if environment is None else tuple(guard.expr for guard in environment.guards[count:])


def _described(value: Any, symbolic: Any, owners: Mapping[int, int]) -> str:
    """Everything of an input that a compiled program depends on; which inputs share memory is part of it.

    Args:
        symbolic: the input as dynamo traced it: its dynamic sizes are symbols.
        owners: for each storage the first tensor that lies in it.
    """
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {symbolic}"
    static = getattr(value, "_dynamo_static_input_type", "")
    owner = owners[storage(value)]
    layout = f"{tuple(symbolic.shape)} {tuple(symbolic.stride())} + {symbolic.storage_offset()} of {owner}"
    grad = "grad" if value.requires_grad else ""
    return " ".join(f"{type(value).__name__} {value.dtype} {value.device} {layout} {static} {grad}".split())


def _target(node: fx.Node) -> str:
    """What a call of a dynamo graph calls, as text. A function that is not torch's (`torch.compiler.allow_in_graph`)
    counts by its content: what it computes while it is traced may be a constant of the program."""
    target: Any = node.target
    if node.op in ("get_attr", "call_module"):
        raise NotStorable(f"it holds the module or constant {target}")
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = f"{module}.{getattr(target, '__qualname__', target)}"
    if "<locals>" in name or "<lambda>" in name:
        raise NotStorable(f"it calls {name}, which has no name")
    if isinstance(target, types.FunctionType) and module.split(".")[0] not in KEYED:
        return f"{name} {of_content(target, name)}"
    return name


def _difference(part: str, before: str | None, now: str | None) -> list[str]:
    """What is said of a part of a key that differs; None where it was absent."""
    if part.startswith(OWN):
        what = "is new" if before is None else "is gone" if now is None else "has another content"
        return [f"your {part} {what}"]
    if part in HASHED:
        return [HASHED[part]]
    if part == "inputs" and before is not None and now is not None:
        pairs = enumerate(zip_longest(before.split("; "), now.split("; "), fillvalue="absent"))
        return [f"input {place}: {old} -> {new}" for place, (old, new) in pairs if old != new]
    return [f"{part}: {before or 'absent'} -> {now or 'absent'}"]


def _differing(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    return [part for part in sorted({*left, *right}) if left.get(part) != right.get(part)]


def _write(file: Path, data: bytes) -> None:
    """Writes all of it or nothing, also where two processes write the same entry."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        part.write(data)
    Path(part.name).replace(file)
