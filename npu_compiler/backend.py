"""torch.compile(model, backend="ascend").

    dynamo graph --lowering--> functional graph --passes--> fused graph --> captured per shape, replayed

`ascend` is the whole road. `compile_fx` stops before the capture: vLLM, which captures by itself, calls it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.utils import detect_fake_mode, lazy_format_graph_code
from torch.utils._pytree import tree_flatten, tree_unflatten

from npu_compiler import cache, dumps
from npu_compiler.aclgraph import npugraph_ex
from npu_compiler.aclgraph.buckets import buckets as buckets  # serving chooses its capture sizes by it
from npu_compiler.aclgraph.labels import Labels
from npu_compiler.aclgraph.program_call import ProgramCall
from npu_compiler.aclgraph.replay import Replayer
from npu_compiler.aclgraph.streams import Streams
from npu_compiler.cache import CacheNote, Program
from npu_compiler.compiled import CompiledGraph as CompiledGraph
from npu_compiler.compiled import Interface
from npu_compiler.config import WHOLE_WEIGHTS, Options, refuse_mode
from npu_compiler.dumps import bundle_of as bundle_of  # serving adds its own captures and report to it
from npu_compiler.errors import OptionError, StoredProgramError
from npu_compiler.fusion_kernels import drop_counts
from npu_compiler.fusion_kernels.chosen import providers
from npu_compiler.fusion_kernels.drop_counts import DropCounts as DropCounts
from npu_compiler.fusion_kernels.drop_counts import Dropped as Dropped
from npu_compiler.graph import once
from npu_compiler.graph.effects import tensors
from npu_compiler.graph.rolled import Rolled, held, whole
from npu_compiler.graph.serialized import NotStorable
from npu_compiler.graph.source import beginning, input_name, where
from npu_compiler.key import compiler_parts, key_without_graph
from npu_compiler.key import fingerprint as fingerprint  # serving and benchmarks ask whether two compilers are one
from npu_compiler.lowering.floats import specialize_module_floats
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline
from npu_compiler.passes.expert_choice import MISSING
from npu_compiler.passes.record import PassRecord
from npu_compiler.plan import agreement, weight_layout
from npu_compiler.plan.ahead import begin_early
from npu_compiler.plan.order import Arrangement, arrange, arrange_rolled
from npu_compiler.portable import Keep, Portable, Written, portable_is_wanted
from npu_compiler.stages import LOWERING, ORDER, PASSES, PLAN, STORE
from npu_compiler.watching import Notes

if TYPE_CHECKING:
    from npu_compiler.inspect.surroundings import Noted
    from npu_compiler.inspect.writer import GraphWriter

GraphHook = Callable[[fx.Graph], None]
STORED = "stored"
FROM_CACHE = "from the cache"
FROM_FILE = "from a file, compiled ahead of time"
WITHOUT_CAPTURE = Options(capture=False)
logger = logging.getLogger(__name__)


class AscendBackend:
    """The backend behind the name "ascend". It remembers, weakly, what it compiled, for `report`."""

    def __init__(self) -> None:
        self._compiled: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
        self._count = itertools.count()
        self.__name__ = "ascend"  # what dynamo's messages call it

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[torch.Tensor],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> CompiledGraph | Portable:
        """What torch.compile calls: lower, run the passes, serve calls by captured graphs."""
        refuse_mode(mode)
        compiled = CompiledGraph(f"graph_{next(self._count)}", checked_options(options))
        specialize_module_floats(gm)
        found, keep = _stored(compiled, gm, example_inputs) if compiled.options.cache else (None, None)
        interface = _interface(gm)
        serve = _captured(compiled, interface.names)
        portable = Portable(compiled) if portable_is_wanted() else None
        if portable is not None:
            keep = portable.keeping(interface, cache.symbolic_inputs(gm, example_inputs), keep)
        if found is not None:
            if keep is not None:  # the portable graph's: a cache keeps nothing that it gave
                keep(found, "")
            _take(compiled, found, interface, example_inputs, serve, captures=True)
        else:
            _compile(compiled, gm, example_inputs, interface, serve, keep=keep, captures=True)
        self._add(compiled)
        return compiled if portable is None else portable

    def load(self, written: Written, inputs: Sequence[Any]) -> CompiledGraph:
        """What `Portable` wrote, in this process. `inputs`: fake ones, as cache.read takes them.

        Raises:
            StoredProgramError: an operator of the program is not there.
        """
        compiled = CompiledGraph(f"graph_{next(self._count)}", Options.of(written.options))
        found = _read(written.program, inputs, written.interface.place)
        serve = _captured(compiled, written.interface.names)
        _take(compiled, found, written.interface, inputs, serve, captures=True, origin=FROM_FILE)
        self._add(compiled)
        return compiled

    def _add(self, compiled: CompiledGraph) -> None:
        compiled.watch()
        self._compiled.add(compiled)

    def compiled(self) -> list[CompiledGraph]:
        """The compiled graphs that are alive, oldest first."""
        return sorted(self._compiled, key=lambda entry: int(entry.name.removeprefix("graph_")))


ascend = AscendBackend()


def report() -> str:
    """What became of the graphs torch.compile(backend="ascend") has compiled in this process and that are alive: each
    pass with what it did and left out and why, each capture with its price, the count of replays."""
    return "\n".join(str(entry) for entry in ascend.compiled()) or "nothing compiled"


def dropped() -> list[Dropped]:
    """What each layer of experts of the compiled graphs that are alive dropped so far, where the option `token_drop`
    lets it. Waits for the device, so it can't be called during a capture."""
    return [entry for compiled in ascend.compiled() if compiled.drops for entry in compiled.drops.read()]


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | Options | None = None,
    *,
    before_lowering: GraphHook | None = None,
    after_passes: GraphHook | None = None,
    keep: Callable[[bytes], None] | None = None,
    name: str = "graph",
    surroundings: Noted | None = None,
    batch: torch.Tensor | None = None,
) -> CompiledGraph:
    """Lowers `gm` and runs the passes; captures nothing.

    Args:
        gm: a dynamo graph (torch IR, as a torch.compile backend receives it). It is changed in place.
        example_inputs: what it will be called with: real or fake tensors, and sizes (int or SymInt).
        before_lowering: called with the dynamo graph; may rewrite it.
        after_passes: called with the functional graph after the passes and before writes go back in place. It sees the
            whole program, unless it says by a true attribute `local` that one of a few layers will do (passes.record).
        keep: called with the result as bytes, which `load_fx` takes, if it can be stored.
        surroundings: what the graph's calls need besides their arguments, for a bundle.
        batch: for what is watched: int64 [2] on the device that the caller writes before each call: how many of the
            batch's rows are no padding, and the number of the step.

    Returns:
        A callable with the graph's own convention, mutations and returned structure included (a flat tuple comes back
        as a list, as from every compiler of torch.compile).

    Raises:
        OptionError: see there.
    """
    compiled = CompiledGraph(name, checked_options(options))
    compiled.batch = batch
    if before_lowering is not None:
        before_lowering(gm.graph)
        gm.recompile()
    kept = None if keep is None else _keeping(compiled, lambda program: keep(cache.write(program)))
    serve = _uncaptured(compiled)
    return _compile(compiled, gm, example_inputs, _interface(gm), serve, after_passes, kept, surroundings)


def load_fx(
    data: bytes,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    name: str = "graph",
    options: Options = WITHOUT_CAPTURE,
    batch: torch.Tensor | None = None,
) -> CompiledGraph:
    """What `compile_fx` made of `gm`, from the bytes it gave to `keep`. `gm` is changed in place.

    Args:
        options, batch: those of `compile_fx`.

    Raises:
        StoredProgramError: the bytes are damaged, of another version, or were made for other sizes.
    """
    found = _read(data, cache.symbolic_inputs(gm, example_inputs), f"{name} ({beginning(gm.graph)})")
    compiled = CompiledGraph(name, options)
    compiled.batch = batch
    return _take(compiled, found, _interface(gm), example_inputs, _uncaptured(compiled))


def checked_options(given: Mapping[str, Any] | Options | None) -> Options:
    """The options, before the work starts.

    Raises:
        OptionError: a name, type or value is not valid, options contradict each other, a pass or rule that is named
            does not exist, or nothing can do what is asked for.
    """
    options = Options.of(given)
    method = options.expert_communication
    if method in MISSING:
        raise OptionError(
            f"expert_communication={method!r} can't be done: {MISSING[method]}",
            rule="a method that is asked for by name is used in every layer whose experts are spread over ranks",
            fix="leave the option out: auto takes the next method that can be used, and the report says why",
        )
    pipeline.selected(options)
    return options


def _read(data: bytes, inputs: Sequence[Any], place: str) -> Program:
    """The program that cache.write wrote."""
    found = cache.read(data, inputs)
    if isinstance(found, str):
        raise StoredProgramError(
            found, where=place, rule="a stored program is used only where it fits", fix="compile again"
        )
    return found


def _captured(compiled: CompiledGraph, names: Sequence[str]) -> Callable[[Functional], Callable[..., Any]]:
    """Serves calls by captured graphs. `names`: of the inputs, in the user's model."""

    def serve(functional: Functional) -> Callable[..., Any]:
        options = compiled.options
        values = compiled.constants.values if compiled.constants else ()
        every_name = [*names, *(node.name for node in values)]
        replayer = Replayer(
            functional.graph, functional.stable, options, compiled.name, every_name, stages=compiled.stages
        )
        if options.capture_with == "npugraph_ex" and replayer.why_uncaptured is None:
            return npugraph_ex.serve(whole(functional.graph), functional.inputs, functional.stable, options.npugraph_ex)
        compiled.ledger = replayer.ledger
        return replayer

    return serve


def _uncaptured(compiled: CompiledGraph) -> Callable[[Functional], Callable[..., Any]]:
    """Serves calls by the program itself, which somebody else may capture."""

    def serve(functional: Functional) -> Callable[..., Any]:
        program = whole(functional.graph)
        call = ProgramCall(program, Labels(compiled.name), Streams.chosen(program, compiled.options))
        compiled.streams = call.planned
        return call

    return serve


def _compile(
    compiled: CompiledGraph,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    interface: Interface,
    serve: Callable[[Functional], Callable[..., Any]],
    after_passes: GraphHook | None = None,
    keep: Keep | None = None,
    surroundings: Noted | None = None,
    captures: bool = False,
) -> CompiledGraph:
    """The common road: lowering, passes, then whatever serves the calls.

    Args:
        captures: `serve` captures, and takes a rolled program.
        keep: called with the program behind the passes.
    """
    stages = compiled.stages
    mode = detect_fake_mode(list(example_inputs))
    environment = mode.shape_env if mode is not None else None
    known_guards = len(environment.guards) if environment is not None else 0

    @stages.stage(PLAN)
    def finish(functional: Functional) -> Callable[..., Any]:
        compiled.program = functional.graph
        _show_code("ascend lowered", functional.graph)
        if compiled.options.freeze:
            once.freeze(functional.graph.graph, functional.stable)
        if dump is not None or any(getattr(compiled.options, name) for name in WHOLE_WEIGHTS):
            once.note_lasting(functional.graph.graph, functional.stable)
        with stages.stage(PASSES):
            compiled.records, program = _rewritten(functional.graph, compiled.options, after_passes, watch)
        if compiled.options.reorder:
            with stages.stage(ORDER):
                compiled.arrangement, program = _in_order(program)
        if keep is not None:
            with stages.stage(STORE):
                guards = cache.guards_since(environment, known_guards)
                kept = Program(program, functional.stable, compiled.records, guards, functional.around)
                keep(kept, functional.convention)
        return _serve_once(compiled, replace(functional, graph=program), serve, watch, dump, captures)

    with _no_collections(), dumps.open_graph(compiled.name, compiled.options, interface.names) as dump:
        watch = dumps.shown_to(compiled.name, dump)
        if dump is not None:
            dump.surround(surroundings)
        with stages.stage(LOWERING):
            call = lower(gm, example_inputs, finish)
    return _finished(compiled, call, interface)


def _take(
    compiled: CompiledGraph,
    found: Program,
    interface: Interface,
    inputs: Sequence[Any],
    serve: Callable[[Functional], Callable[..., Any]],
    captures: bool = False,
    origin: str = FROM_CACHE,
) -> CompiledGraph:
    """The road of a program that was stored: it has lowering and passes behind it."""
    compiled.records, compiled.stored = found.records, origin
    functional = Functional(found.graph, list(inputs), found.stable, found.around)
    with _no_collections(), dumps.open_graph(compiled.name, compiled.options, interface.names) as dump:
        watch = dumps.shown_to(compiled.name, dump)
        with compiled.stages.stage(PLAN):
            call = found.around.call(_serve_once(compiled, functional, serve, watch, dump, captures))
    return _finished(compiled, call, interface)


def _finished(compiled: CompiledGraph, call: Callable[..., Any], interface: Interface) -> CompiledGraph:
    rewrites = sum(len(record.fired) for record in compiled.records)
    logger.info("compiled %s (%s): %d rewrites", compiled.name, interface.place, rewrites)
    logger.debug("%s", compiled)
    spec = interface.returned
    compiled._call = call if spec is None else lambda *args: tree_unflatten(list(call(*args)), spec)
    return compiled


def _rewritten(
    module: fx.GraphModule, options: Options, after_passes: GraphHook | None, watch: pipeline.Watch | None
) -> tuple[list[PassRecord], fx.GraphModule | Rolled]:
    """What the passes make of a program, which they change, and what they did."""
    if options.watch:
        return pipeline.run(module, options, after_rules=after_passes, watch=watch), module
    records, rolled = pipeline.run_rolled(module, options, after_passes, watch)
    return records, rolled or module


def _in_order(program: fx.GraphModule | Rolled) -> tuple[Arrangement, fx.GraphModule | Rolled]:
    """The program with its calls in the order that needs the least memory."""
    found = arrange_rolled(program) if isinstance(program, Rolled) else None
    if found is not None:
        return found
    program = whole(program)
    arrangement = arrange(program.graph)
    program.recompile()
    return arrangement, program


def _runs_rolled(program: fx.GraphModule | Rolled, options: Options, dump: GraphWriter | None) -> bool:
    """Whether a program is captured with its layers rolled up. All that tells them apart needs it written out."""
    one_by_one = dump is not None or options.watch or options.token_drop or options.weight_nz != "off"
    if one_by_one or not options.capture or options.capture_with != "ascend" or options.multistream != "off":
        return False
    if not isinstance(program, Rolled) or program.repetition is None or agreement.planned(program.graph):
        return False
    numbers = any(not any(True for _ in tensors(node)) for node in program.graph.output_node().all_input_nodes)
    return not numbers and not any(node.meta.get(once.ONCE) for node in (*program.periods, *program.rest))


def _keeping(compiled: CompiledGraph, store: Callable[[Program], None]) -> Keep:
    """Stores a program, unless it can't be stored or is not all that a call takes; the graph's report says it."""

    def keep(program: Program, convention: str) -> None:
        reason = convention
        if not reason:
            try:
                store(program)
            except NotStorable as error:
                reason = str(error)
        compiled.stored = f"not stored: {reason}" if reason else STORED

    return keep


def _show_code(name: str, module: fx.GraphModule) -> None:
    """Logs a program, if that is wanted. depyf takes what `lazy_format_graph_code` is asked for, also if it is not."""
    logger.debug("%s", lazy_format_graph_code(name, module))


def _serve_once(
    compiled: CompiledGraph,
    functional: Functional,
    serve: Callable[[Functional], Callable[..., Any]],
    watch: pipeline.Watch | None,
    dump: GraphWriter | None,
    captures: bool,
) -> Callable[..., Any]:
    """`serve`, with what is computed once taken out of the program and handed to it as inputs."""
    rolls = captures and _runs_rolled(functional.graph, compiled.options, dump)
    chosen = functional.graph if rolls else whole(functional.graph)
    program = held(chosen)
    plans = agreement.planned(program.graph)
    compiled.weights = weight_layout.planned(program.graph, compiled.options.weight_nz)
    part = compiled.constants = once.split(program)
    if part is not None:
        compiled.ahead = begin_early(program.graph, part.values)
        program.recompile()
    compiled.program = (
        replace(chosen) if isinstance(chosen, Rolled) else chosen
    )  # what was written out had the constants
    functional = replace(functional, graph=compiled.program)
    _show_code("ascend final", program)
    if watch is not None:
        watch("final", whole(compiled.program), None)
    if compiled.options.watch:
        keep = compiled.options.watch_keep
        compiled.notes = Notes(program.graph, compiled.name, keep, compiled.batch)
        program.recompile()
    if compiled.options.token_drop and drop_counts.dispatches(program.graph):
        compiled.drops = DropCounts(program.graph, compiled.batch)
        program.recompile()
    call = serve(functional) if part is None else _with_values(part, functional, serve)
    call = weight_layout.applied(agreement.agreed(call, plans), compiled.weights)
    if dump is None:
        return call
    dump.plan(
        compiled.arrangement,
        compiled.memory,
        providers(program.graph),
        compiled.constants,
        CacheNote(compiled.stored, compiled.key or key_without_graph(compiled.options), tuple(compiled.missed)),
    )
    compiled.dumped = dump.summary
    if compiled.ledger is not None:
        dump.watch(compiled.ledger)
        weakref.finalize(compiled, dump.finish, compiled.ledger)
    return dump.keep_inputs(call, functional.stable)


def _with_values(
    part: once.Split, functional: Functional, serve: Callable[[Functional], Callable[..., Any]]
) -> Callable[..., Any]:
    """`serve`, for a program that has the values computed once as its last inputs."""
    count = len(functional.inputs)
    inputs = [*functional.inputs, *(node.meta["val"] for node in part.values)]
    lasting = (*functional.stable, *range(count, len(inputs)))
    call = serve(replace(functional, inputs=inputs, stable=lasting))
    values = once.Once(part)
    return lambda *args: call(*args, *values(args))


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collection waits: a large program is many small objects that all stay, and each full collection, of which
    a compilation would trigger several, walks through every one of the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _stored(
    compiled: CompiledGraph, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[Program | None, Keep | None]:
    """The stored program of a dynamo graph, or how to store it; neither where it can't be told from another."""
    graph = cache.graph_parts(gm, example_inputs)
    if isinstance(graph, str):
        compiled.stored = f"not stored: {graph}"
        return None, None
    parts = {**graph, **compiler_parts(compiled.options), "device": str(torch.npu.get_device_name())}
    compiled.key = parts
    store = cache.ProgramCache(cache.folder())
    found = store.load(parts, cache.symbolic_inputs(gm, example_inputs))
    if isinstance(found, Program):
        return found, None
    first = next((node for node in gm.graph.nodes if node.op.startswith("call")), None)
    name = compiled.name if first is None else where(first)

    def write(program: Program) -> None:
        compiled.missed = store.store(name, parts, program)

    return None, _keeping(compiled, write)


def _interface(gm: fx.GraphModule) -> Interface:
    """How `gm` is called. It returns a flat tuple from now on, which AOTAutograd wants."""
    names = [input_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    output = gm.graph.output_node()
    (returned,) = output.args
    leaves, spec = tree_flatten(returned)
    if isinstance(returned, (list, tuple)) and all(not isinstance(item, (list, tuple, dict)) for item in returned):
        return Interface(names, beginning(gm.graph), None)
    output.args = (tuple(leaves),)
    gm.recompile()
    return Interface(names, beginning(gm.graph), spec)
