"""Reading a bundle: validated data, each file when it is first asked for. Nothing in a bundle is run by it.

    bundle = inspect.bundle.open("dump/rank0")
    for graph in bundle.graphs:
        print(graph.name, [stage.name for stage in graph.stages])

What a bundle holds, and how it lies in files, is in contents.py.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from npu_compiler.errors import BundleError
from npu_compiler.inspect.contents import (
    CAPTURES,
    FAILED,
    FINAL,
    GRAPH,
    HEADER,
    INPUTS,
    MEMORY,
    NUMBERS,
    PLAN,
    STAGES,
    SURROUNDINGS,
    Captured,
    Graph,
    Header,
    Inputs,
    Plan,
    Stage,
    Surroundings,
)
from npu_compiler.inspect.program import Data, Program
from npu_compiler.inspect.python_text import CONSTANTS
from npu_compiler.inspect.run import CALLS, RUN, Calls, ModelCapture, Run

if TYPE_CHECKING:
    from torch import Tensor

Place = Path | zipfile.Path
Kind = TypeVar("Kind", bound=Data)
LARGEST = 1 << 33
"""Bytes that a file of a zipped bundle may unfold to."""
A_BUNDLE = "a bundle is a folder that the option `dump` wrote, or a zip of it"


class Bundle:
    """What one process left behind.

    Attributes:
        place: its folder, on disk or in a zip.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @functools.cached_property
    def header(self) -> Header:
        """The format and the environment."""
        return _read(self.place / HEADER, Header)

    @functools.cached_property
    def graphs(self) -> tuple[StoredGraph, ...]:
        """The graphs, oldest first."""
        found = [StoredGraph(entry) for entry in self.place.iterdir() if (entry / GRAPH).exists()]
        return tuple(sorted(found, key=lambda graph: (graph.about.started, graph.name)))

    @functools.cached_property
    def run(self) -> Run | None:
        """Serving's run report; None where nothing was served."""
        return _read(self.place / RUN, Run) if (self.place / RUN).exists() else None

    @functools.cached_property
    def captures(self) -> tuple[ModelCapture, ...]:
        """What vLLM captured, in order."""
        return tuple(_lines(self.place / CAPTURES, ModelCapture))

    def graph(self, name: str = "") -> StoredGraph:
        """A graph by its name; without one, the only graph.

        Raises:
            BundleError: there is none of that name, or several and no name is given.
        """
        found = [graph for graph in self.graphs if not name or name == graph.name]
        if len(found) != 1:
            names = ", ".join(graph.name for graph in self.graphs) or "none"
            what = f"{self} has no graph {name!r}" if name else f"{self} has {len(found)} graphs"
            raise BundleError(what, rule=f"its graphs are {names}", fix="name one of them")
        return found[0]

    def __str__(self) -> str:
        return str(self.place).rstrip("/")


class StoredGraph:
    """One compiled graph of a bundle.

    Attributes:
        name: the graph's folder, which no other graph of the bundle has.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.name = place.name

    @functools.cached_property
    def about(self) -> Graph:
        """Options and passes."""
        return _read(self.place / GRAPH, Graph)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in their order; fewer where the process ended early."""
        return tuple(_lines(self.place / STAGES, Stage))

    @functools.cached_property
    def incomplete(self) -> str:
        """What is missing of the stages; empty where the compilation was written to its end, or to its error."""
        last = f"behind {self.stages[-1].name}" if self.stages else "from the first on"
        if _is_cut_off(self.place / STAGES):
            return f"the stages {last} are missing: {STAGES} ends in the middle of a line"
        if not self.stages or self.stages[-1].name not in (FINAL, FAILED):
            return f"the stages {last} are missing: the process ended while it compiled"
        return ""

    @functools.cached_property
    def captures(self) -> tuple[Captured, ...]:
        """The captures in their order."""
        return tuple(_lines(self.place / CAPTURES, Captured))

    @functools.cached_property
    def calls(self) -> Calls:
        """Replays and other calls: all of them, or those before the last capture where the process ended early."""
        if (self.place / CALLS).exists():
            return _read(self.place / CALLS, Calls)
        if not self.captures:
            return Calls()
        last = self.captures[-1]
        return Calls(replays=last.replays, uncaptured=last.uncaptured, evicted=last.evicted)

    @functools.cached_property
    def plan(self) -> Plan | None:
        """What was decided behind the passes; None where the compilation did not get there."""
        return _read(self.place / PLAN, Plan) if (self.place / PLAN).exists() else None

    @functools.cached_property
    def inputs(self) -> Inputs | None:
        """The first call's inputs; None where they were not asked for."""
        return _read(self.place / NUMBERS, Inputs) if (self.place / NUMBERS).exists() else None

    @functools.cached_property
    def surroundings(self) -> Surroundings | None:
        """What its calls need besides their arguments; None where that is nothing."""
        return _read(self.place / SURROUNDINGS, Surroundings) if (self.place / SURROUNDINGS).exists() else None

    def stage(self, name: str) -> Stage:
        """The last stage of this name. `common` stands twice in the pipeline.

        Raises:
            BundleError: there is none.
        """
        for stage in reversed(self.stages):
            if stage.name == name:
                return stage
        known = ", ".join(dict.fromkeys(stage.name for stage in self.stages))
        raise BundleError(f"{self.name} has no stage {name!r}", rule=f"its stages are {known}", fix="name one of them")

    def program(self, stage: Stage) -> Program:
        """The program at a stage."""
        return _program(self.place / f"{stage.program}.json")

    def python(self, stage: Stage) -> str:
        """The program at a stage as Python, printed anew from the checked data."""
        from npu_compiler.inspect.python_text import python_text

        return python_text(self.program(stage), f"{self.name}, {stage.name}")

    def constants(self) -> Mapping[str, Tensor]:
        """The values of the programs' small constants. This, `tensors` and `memory` take torch."""
        return _tensors(self.place / CONSTANTS)

    def tensors(self) -> Mapping[str, Tensor]:
        """The memory of the first call's tensors as bytes, by the names that `inputs` gives."""
        return _tensors(self.place / INPUTS)

    def memory(self) -> Mapping[str, Tensor]:
        """Contents of memory that the calls read besides their arguments, by the names of `surroundings`."""
        return _tensors(self.place / MEMORY)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(len(entry.read_bytes()) for entry in self.place.iterdir())


def open(path: str | Path) -> Bundle:
    """The bundle at a path: its folder, a zip of it, or a folder or zip that holds just one.

    Raises:
        BundleError: there is none, or several.
    """
    found = all_of(path)
    if len(found) != 1:
        raise BundleError(
            f"{path} holds {len(found)} bundles",
            rule=f"a bundle is what one process wrote; here: {', '.join(map(str, found))}",
            fix="name one of them",
        )
    return found[0]


def all_of(path: str | Path) -> list[Bundle]:
    """All bundles at a path: those of the ranks of one run, say. There is at least one.

    Raises:
        BundleError: the path is neither a folder nor a zip, or holds no bundle.
    """
    if not str(path):
        raise BundleError("the path of the bundle is empty", rule=A_BUNDLE, fix="name the folder that was dumped to")
    place = _place(Path(path))
    if (place / HEADER).exists():
        return [Bundle(place)]
    if (place / GRAPH).exists():
        raise _graph_alone(Path(path))
    below = [entry for entry in place.iterdir() if entry.is_dir()]
    if not any((entry / HEADER).exists() for entry in below) and len(below) == 1:
        below = [entry for entry in below[0].iterdir() if entry.is_dir()]  # a zip of the folder above
    found = [Bundle(entry) for entry in sorted(below, key=lambda entry: entry.name) if (entry / HEADER).exists()]
    if not found:
        raise BundleError(
            f"{path} holds no bundle",
            rule=f"{A_BUNDLE}; it has a file {HEADER}",
            fix="check the path; if it is right: did the process compile anything, with the option `dump`?",
        )
    return found


def _place(path: Path) -> Place:
    """A folder on disk, or in the zip that a part of the path names."""
    if path.is_dir():
        return path
    for zipped in (path, *path.parents):
        if zipped.is_file() and zipfile.is_zipfile(zipped):
            inner = path.relative_to(zipped).as_posix()
            return zipfile.Path(zipped, "" if inner == "." else f"{inner}/")
    if path.is_file():
        inside = (path.parent / HEADER).exists() or (path.parent / GRAPH).exists()
        fix = f"name the folder that it lies in, {path.parent}" if inside else "check the path"
        raise BundleError(f"{path} is a file, and no zip", rule=A_BUNDLE, fix=fix)
    raise BundleError(f"there is no bundle at {path}", rule=A_BUNDLE, fix="check the path: nothing is there")


def _graph_alone(path: Path) -> BundleError:
    """What to say of a graph's folder, which is a part of a bundle."""
    above = path.absolute().parent
    named = (_place(above) / HEADER).exists()
    name = path.absolute().name
    return BundleError(
        f"{path} is one graph of a bundle",
        rule=f"{A_BUNDLE}; it has a file {HEADER}, and a folder for each graph",
        fix=f"name {above}, and this graph with --graph {name}" if named else "name the folder above it",
    )


def _read(file: Place, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate_json(_bytes(file))
    except (OSError, KeyError, ValidationError) as error:
        raise _damaged(file, error) from error


@functools.lru_cache(maxsize=8)
def _program(file: Place) -> Program:
    return _read(file, Program)


def _lines(file: Place, kind: type[Kind]) -> Iterator[Kind]:
    """The entries of a file with one a line. A last line that a crash cut off is left out."""
    if not file.exists():
        return
    *lines, rest = _bytes(file).split(b"\n")
    if rest and _is_json(rest):
        lines.append(rest)
    for line in lines:
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            raise _damaged(file, error) from error


def _is_cut_off(file: Place) -> bool:
    """Whether the last line of a file with one entry a line was not written to its end."""
    rest = _bytes(file).rpartition(b"\n")[2] if file.exists() else b""
    return bool(rest) and not _is_json(rest)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _tensors(file: Place) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.exists():
        return {}
    try:
        return load(_bytes(file))
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _bytes(file: Place) -> bytes:
    if isinstance(file, zipfile.Path) and file.root.getinfo(file.at).file_size > LARGEST:
        raise BundleError(f"{file} unfolds to more than {LARGEST} bytes", rule="no file of a bundle is that large")
    return file.read_bytes()


def _damaged(file: Place, error: Exception) -> BundleError:
    first = str(error) if not isinstance(error, ValidationError) else _first(error)
    return BundleError(
        f"{file} is no part of a bundle that can be read: {first}",
        rule="a bundle is data of a checked form (npu_compiler/inspect/contents.py)",
        fix="read it with the version that wrote it, or write it anew",
    )


def _first(error: ValidationError) -> str:
    entry = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
