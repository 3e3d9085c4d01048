"""Writing a bundle while the compiler works: file by file, so that a crash leaves all that came before it."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, fx
from torch._dynamo.utils import get_compilation_metrics
from torch._guards import CompileContext

from npu_compiler.aclgraph.ledger import Capture, Ledger
from npu_compiler.cache import CacheNote
from npu_compiler.config import DEFAULTS, Options
from npu_compiler.facts.fact import Fact
from npu_compiler.facts.sizes import listening
from npu_compiler.graph.effects import value
from npu_compiler.graph.once import Split
from npu_compiler.inspect import bundle, contents, show
from npu_compiler.inspect.contents import (
    CAPTURES,
    FORMAT,
    GRAPH,
    HEADER,
    INPUTS,
    MEMORY,
    NUMBERS,
    PLAN,
    STAGES,
    SURROUNDINGS,
    Environment,
    Header,
    PassInfo,
    RuleInfo,
)
from npu_compiler.inspect.from_graph import constants_of, program_of, sizes_of
from npu_compiler.inspect.program import Data, Program
from npu_compiler.inspect.python_text import CONSTANTS, python_text
from npu_compiler.inspect.run import CALLS, Calls
from npu_compiler.inspect.surroundings import Noted
from npu_compiler.inspect.values import saved
from npu_compiler.passes.pattern import call_count, root_targets
from npu_compiler.passes.pipeline import LOWERED, count_calls
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.passes.rewrite import Rule
from npu_compiler.plan.estimate import Sizes
from npu_compiler.plan.first_call import before_first
from npu_compiler.plan.memory import MemoryPlan
from npu_compiler.plan.order import Arrangement
from npu_compiler.plan.schedule import StreamPlan
from npu_compiler.runtime import loader, trace
from npu_compiler.units import in_bytes

VERSIONED = ("npu-compiler", "torch", "torch_npu", "vllm", "transformers", "triton", "sympy", "numpy")
OWN = "NPU_COMPILER_"
"""How the names of this project's environment variables begin."""
Kind = TypeVar("Kind", bound=Data)
logger = logging.getLogger(__name__)


def open_graph(
    folder: str, name: str, options: Options, passes: Sequence[Pass], inputs: Sequence[str], prints: bool = False
) -> GraphWriter:
    """Begins a graph in this process's bundle, which lies in `folder` under a name of its own.

    Args:
        prints: print the pipeline when the graph is compiled. Without a folder that is all.

    Raises:
        OSError: nothing can be written there.
    """
    if not folder:
        return PrintedGraph(name, options, passes, inputs)
    return GraphWriter(bundle_of(folder), name, options, passes, inputs, prints)


def bundle_of(folder: str) -> Path:
    """This process's bundle in `folder`, begun if it is not there yet.

    Raises:
        OSError: nothing can be written there.
    """
    return _bundle(str(Path(folder).resolve()), os.getpid())


@functools.cache
def _bundle(folder: str, process: int) -> Path:
    """The folder of one process's bundle. A process that was forked off gets its own."""
    rank, ranks = _rank()
    place = _new_folder(Path(folder), f"rank{rank}")
    header = Header(format=FORMAT, environment=_environment(rank, ranks), started=time.time())
    (place / HEADER).write_text(header.model_dump_json(indent=1))
    return place


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist: `name`, `name.1`, `name.2`, ...; no two processes get the same one."""
    parent.mkdir(parents=True, exist_ok=True)
    count = 0
    while True:
        place = parent / (f"{name}.{count}" if count else name)
        try:
            place.mkdir()
        except FileExistsError:
            count += 1
        else:
            return place


def _rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    rank, ranks = (int(text) if text.isdecimal() else None for text in given)
    return rank or 0, ranks or 1


def _environment(rank: int, ranks: int) -> Environment:
    choice = loader.choose()
    return Environment(
        versions={"python": platform.python_version(), **dict(_versions())},
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        cann=f"{choice.runtime}, because {choice.reason}",
        device=str(torch.npu.get_device_name()),
        rank=rank,
        ranks=ranks,
        variables={name: text for name, text in sorted(os.environ.items()) if name.startswith(OWN)},
    )


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "absent"


class GraphWriter:
    """What is written of one graph. It is entered round the compilation, so that what ends it early is written too.

    Attributes:
        place: the graph's folder.
    """

    def __init__(
        self,
        parent: Path,
        name: str,
        options: Options,
        passes: Sequence[Pass],
        inputs: Sequence[str],
        prints: bool = False,
    ) -> None:
        self._prints = prints
        self._compile_id = str(CompileContext.current_compile_id() or "")
        self._started = time.time()
        self.place = _new_folder(parent, re.sub(r"[^\w.-]+", "_", name)[:80] or "graph")
        self._start = time.perf_counter()
        self._programs = 0
        self._last: tuple[str, str] = ("", "")  # the last program: its text, its file
        self._constants: dict[str, Tensor] = {}
        self._stage = "the start"
        self._sizes: Sizes = {}
        self._which_inputs = options.dump_inputs
        self._asked: Counter[Fact] = Counter()
        self._listening = listening(self._hear)
        self._stopped = False
        self._noted: Noted | None = None
        self._surroundings: contents.Surroundings | None = None
        values = {entry.name: getattr(options, entry.name) for entry in fields(options)}
        graph = contents.Graph(
            format=FORMAT,
            name=name,
            started=self._started,
            options={key: repr(value) for key, value in values.items()},
            given=tuple(key for key, value in values.items() if value != getattr(DEFAULTS, key)),
            passes=tuple(_pass_info(entry, options) for entry in passes),
            inputs=tuple(inputs),
            compile_id=self._compile_id,
        )
        self._write(GRAPH, graph.model_dump_json(indent=1))

    def __enter__(self) -> GraphWriter:
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)
        if error is not None:
            stopped = contents.Stage(
                name=contents.FAILED, error=f"behind {self._stage}: {type(error).__name__}: {error}"
            )
            self._append(STAGES, stopped)
        if self._prints and not self._stopped:
            print(show.pipeline(bundle.StoredGraph(self.place)), file=sys.stderr)

    def surround(self, noted: Noted | None) -> None:
        """Says what the program's calls need besides their arguments; before the first stage."""
        self._noted = noted

    def stage(self, name: str, module: fx.GraphModule, record: PassRecord | None = None) -> None:
        """Writes a stage (passes.pipeline.Watch)."""
        self._stage = name
        if name == LOWERED and self._noted is not None:
            inputs = self._noted.inputs({node.name: value(node) for node in module.graph.find_nodes(op="placeholder")})
            self._surroundings = contents.Surroundings(
                module=self._noted.module, inputs=inputs, about=self._noted.about(inputs)
            )
            self._write(SURROUNDINGS, self._surroundings.model_dump_json())
        asked = tuple(
            contents.Asked(answer=fact.truth.value, text=fact.text, times=times) for fact, times in self._asked.items()
        )
        self._asked.clear()
        graph = module.graph
        self._sizes = sizes_of(graph)
        entry = contents.Stage.model_construct(
            name=name,
            program=self._program(name, program_of(graph), constants_of(graph)),
            calls=sum(node.op == "call_function" for node in graph.nodes),
            calls_of_all=count_calls(graph),
            asked=asked,
            **(_record_fields(record) if record is not None else {}),
        )
        self._append(STAGES, entry)

    def plan(
        self,
        arrangement: Arrangement | None,
        memory: MemoryPlan | None,
        providers: Sequence[str],
        constants: Split | None,
        cache: CacheNote,
    ) -> None:
        """Writes what was decided behind the passes, and says where the graph's part of the bundle is."""
        found = contents.Plan(
            order=None if arrangement is None else _data(contents.Order, arrangement),
            memory=None if memory is None else _memory(memory, self._sizes),
            providers=tuple(providers),
            once=tuple(node.name for node in constants.values) if constants is not None else (),
            once_bytes=str(constants.size if constants is not None else 0),
            cache=cache.text,
            cache_key=dict(cache.key),
            cache_missed=cache.missed,
            seconds=time.perf_counter() - self._start,
        )
        self._write(PLAN, found.model_dump_json(indent=1))
        if self.summary:
            logger.info("dumped %s", self.summary)

    @property
    def summary(self) -> str:
        """Where it lies and how large it is."""
        if self._stopped:
            return f"{self.place}, incomplete"
        size = sum(file.stat().st_size for file in self.place.iterdir())
        return f"{self.place}, {in_bytes(size)}"

    def watch(self, ledger: Ledger) -> None:
        """Writes each capture of the ledger when it happens."""

        def captured(capture: Capture, plan: StreamPlan | None) -> None:
            self._append(CAPTURES, _captured(ledger, capture, plan))

        ledger.watch = captured

    def finish(self, ledger: Ledger) -> None:
        """Writes what became of the calls; when there will be no more. The bundle may be gone by then."""
        if not self.place.exists():
            return
        calls = Calls(
            replays=ledger.replays,
            uncaptured={str(text): count for text, count in ledger.uncaptured.items()},
            evicted=tuple(ledger.evicted),
            recompiled=self._why_recompiled(),
        )
        self._write(CALLS, calls.model_dump_json())

    def _why_recompiled(self) -> str:
        """The guard that failed, which Dynamo tells when a compilation has ended; empty for a first compilation."""
        # After torch._dynamo.reset() the ids begin anew: it is the last such compilation that began before this bundle.
        found = [
            entry.recompile_reason or ""
            for entry in get_compilation_metrics()
            if entry.compile_id == self._compile_id and (entry.start_time or 0.0) <= self._started
        ]
        return found[-1] if found and self._compile_id else ""

    def keep_inputs(self, run: Callable[..., Any], stable: Sequence[int]) -> Callable[..., Any]:
        """`run`, which at its first call (that its surroundings take for one) writes down its inputs, as far as they
        are asked for; `stable` as in lowering.functional.Functional."""
        if self._which_inputs == "off":
            return run
        everything = self._which_inputs == "all"

        def keep(args: Sequence[Any]) -> bool:
            if not self._step_is_kept(everything):
                return False
            parameters = {index for index, arg in enumerate(args) if isinstance(arg, torch.nn.Parameter)}
            self._inputs(args, set() if everything else parameters.union(stable))
            return True

        return before_first(run, keep)

    def _step_is_kept(self, everything: bool) -> bool:
        """Writes what the call's surroundings are; false if it is none that is worth keeping."""
        if self._noted is None or self._surroundings is None:
            return True
        step = self._noted.step(everything)
        if step is None:
            return False
        about, memory = step
        self._write(SURROUNDINGS, self._surroundings.model_copy(update={"step": about}).model_dump_json())
        if memory:
            self._write(MEMORY, save(memory))
        return True

    def _inputs(self, args: Sequence[Any], left_out: set[int]) -> None:
        kept = [None if i in left_out else arg for i, arg in enumerate(args)]
        inputs, pieces = saved(kept)
        about = contents.Inputs(inputs=tuple(inputs), left_out=tuple(f"input_{i}" for i in sorted(left_out)))
        self._write(INPUTS, save(pieces))
        self._write(NUMBERS, about.model_dump_json())

    def _program(self, stage: str, program: Program, constants: Mapping[str, Tensor]) -> str:
        """Writes a program unless it is the last one again; returns its file's name without the ending."""
        text = program.model_dump_json(exclude_defaults=True)
        if text == self._last[0]:
            return self._last[1]
        name = f"{self._programs:02}_{re.sub(r'[^A-Za-z0-9_-]+', '_', stage)}"
        self._programs += 1
        if constants.keys() - self._constants.keys():
            self._constants |= constants
            self._write(CONSTANTS, save(self._constants))
        self._write(f"{name}.json", text)
        self._write(f"{name}.py", python_text(program, f"{self.place.name}, {stage}"))
        self._last = (text, name)
        return name

    def _hear(self, fact: Fact) -> None:
        self._asked[fact] += 1

    def _append(self, file: str, entry: Data) -> None:
        self._write(file, entry.model_dump_json(exclude_defaults=True) + "\n", "ab")

    def _write(self, file: str, data: str | bytes, mode: str = "wb") -> None:
        """Writes, or gives up for good with a warning: a full disk must not end what is being compiled."""
        if self._stopped:
            return
        try:
            with (self.place / file).open(mode) as out:
                out.write(data if isinstance(data, bytes) else data.encode(errors="backslashreplace"))
        except OSError as error:
            self._stopped = True
            logger.warning("the dump in %s ends here: %s", self.place, error)


class PrintedGraph(GraphWriter):
    """A graph whose pipeline is only printed: what is written of it lasts until then."""

    def __init__(self, name: str, options: Options, passes: Sequence[Pass], inputs: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="npu_compiler_")
        super().__init__(Path(self._folder.name), name, options, passes, inputs, prints=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()

    @property
    def summary(self) -> str:
        """Nothing of it is left."""
        return ""

    def watch(self, ledger: Ledger) -> None:
        """Captures come later."""

    def finish(self, ledger: Ledger) -> None:
        """Nothing of it is left."""

    def keep_inputs(self, run: Callable[..., Any], stable: Sequence[int]) -> Callable[..., Any]:
        """Keeps none."""
        return run


def _data(kind: type[Kind], source: object, **more: Any) -> Kind:
    """What a bundle keeps of an object: the attributes that `kind` has, and `more`."""
    found = {name: getattr(source, name) for name in kind.model_fields if name not in more and hasattr(source, name)}
    return kind.model_construct(**found, **more)


def _pass_info(entry: Pass, options: Options) -> PassInfo:
    rules = tuple(_rule_info(rule, rule.name in options.disabled_rules) for rule in entry.rules)
    return PassInfo(name=entry.name, place=entry.place, rules=rules)


def _rule_info(rule: Rule, disabled: bool) -> RuleInfo:
    code = getattr(inspect.unwrap(rule.reference), "__code__", None)  # a callable object has none
    return RuleInfo(
        name=rule.name,
        roots=tuple(sorted(root_targets(rule.pattern))),
        calls=call_count(rule.pattern),
        disabled=disabled,
        file="" if code is None else code.co_filename,
        line=0 if code is None else code.co_firstlineno,
    )


def _record_fields(record: PassRecord) -> dict[str, Any]:
    attempts, record.attempts = record.attempts or (), None  # written once, and kept nowhere else
    return {
        "ran": True,
        "seconds": record.seconds,
        "fired": tuple(
            _data(
                contents.Fire,
                entry,
                kernels=None if entry.saves is None else entry.saves.kernels,
                bytes="" if entry.saves is None else str(entry.saves.bytes),
            )
            for entry in record.fired
        ),
        "refused": tuple(_data(contents.Refusal, entry) for entry in record.refused),
        "attempts": tuple(_data(contents.Attempt, entry) for entry in attempts),
    }


def _memory(plan: MemoryPlan, sizes: Sizes) -> contents.Memory:
    try:
        starts: Sequence[int | None] = plan.offsets(sizes)
        lengths: Sequence[int | None] = plan.extents(sizes)
    except (KeyError, ValueError):  # a size that only the run knows
        starts = lengths = [None] * len(plan.blocks)
    blocks = tuple(
        contents.Block(
            name=block.lifetime.name,
            first=block.lifetime.first,
            last=block.lifetime.last,
            offset=str(start),
            end=str(end),
            returned=block.lifetime.returned,
            start=at,
            size=length,
        )
        for (block, start, end), at, length in zip(plan.formulas(), starts, lengths, strict=True)
    )
    return contents.Memory(peak=str(plan.peak_formula), live=str(plan.live_formula), blocks=blocks)


def _captured(ledger: Ledger, capture: Capture, plan: StreamPlan | None) -> contents.Captured:
    steps = () if plan is None else plan.steps
    return _data(
        contents.Captured,
        capture,
        steps=tuple(_data(contents.Step, step, node=step.node.name) for step in steps),
        joins=() if plan is None else plan.joins,
        tasks=tuple(_task(entry) for entry in trace.nodes(capture.graph_id)),
        replays=ledger.replays,
        uncaptured=dict(ledger.uncaptured),
        evicted=tuple(ledger.evicted),
    )


def _task(node: Mapping[str, Any]) -> contents.Task:
    return contents.Task.model_construct(name=node["name"], stream=node["stream"], node=node.get("node", ""))
