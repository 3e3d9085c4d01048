"""Random functional programs, built call by call as FX graphs on fake values: no Dynamo, no AOTAutograd.

A program is a value: inputs and steps, the inputs it writes at its end, and what it returns. `decode` makes one of any
list of numbers, so that hypothesis can leave out any part when it shrinks; `build` makes the graph of one that is
known, which is how failures are kept as tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves

from npu_compiler.graph.effects import storage
from tests.properties.compare import fake_input
from tests.properties.fragments import HALVES, fragments
from tests.properties.graph_kinds import Kind, kind_of
from tests.properties.graph_steps import STEPS
from tests.properties.programs import alone

COLUMNS = 8
LAYOUTS = ("dense", "transposed", "offset", "strided", "gaps", "expanded")
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "later_rows": lambda x: x[1:],
    "whole": lambda x: x[:],
    "transposed": lambda x: x.t(),
    "even_columns": lambda x: x[:, ::2],
    "first_row_again": lambda x: x[:1].expand(x.shape[0], -1),
}
"""What an input may be of an earlier one; `whole` is the same argument twice."""
Lengths: TypeAlias = Mapping[int, int]
"""For a size as drawn the size to run with."""
SAME: Lengths = {}


@dataclass(frozen=True)
class Own:
    """An input: a matrix of random numbers. Other columns than COLUMNS grow, as rows do."""

    rows: int
    columns: int = COLUMNS
    layout: str = "dense"

    def make(self, dtype: torch.dtype, seed: int, lengths: Lengths, earlier: Sequence[Tensor]) -> Tensor:
        rows = lengths.get(self.rows, self.rows)
        columns = self.columns if self.columns == COLUMNS else lengths.get(self.columns, self.columns)
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device_of(dtype))

        match self.layout:
            case "transposed":
                return drawn(columns, rows).t()
            case "offset":
                return drawn(rows + 2, columns)[2:]
            case "strided":
                return drawn(rows, 2 * columns)[:, ::2]
            case "gaps":
                return drawn(rows, columns + 3)[:, :columns]
            case "expanded":
                return drawn(1, columns).expand(rows, columns)
        return drawn(rows, columns)

    def grows(self, dtype: torch.dtype) -> tuple[bool, ...]:
        return True, self.columns != COLUMNS


@dataclass(frozen=True)
class Overlap:
    """An input: a part of an earlier one, in the same memory."""

    of: int
    part: str = "later_rows"

    def make(self, dtype: torch.dtype, seed: int, lengths: Lengths, earlier: Sequence[Tensor]) -> Tensor:
        return PARTS[self.part](earlier[self.of])


@dataclass(frozen=True)
class Taken:
    """An input: what a fragment takes in a place."""

    fragment: str
    place: int

    def make(self, dtype: torch.dtype, seed: int, lengths: Lengths, earlier: Sequence[Tensor]) -> Tensor:
        given = _drawn(self.fragment, dtype, seed)[self.place].clone()
        if not any(self.grows(dtype)):
            return given
        length = lengths.get(given.shape[0], given.shape[0])
        return given if length == given.shape[0] else torch.cat([given] * -(-length // given.shape[0]))[:length]

    def grows(self, dtype: torch.dtype) -> tuple[bool, ...]:
        examples = example(self.fragment, dtype)
        rows = next((item.shape[0] for item in examples if item.dim() > 1), 0)
        like = examples[self.place]
        return tuple(dimension == 0 and like.dim() > 1 and size == rows for dimension, size in enumerate(like.shape))


Input: TypeAlias = "Own | Overlap | Taken"
Step: TypeAlias = "Input | tuple[str, tuple[int, ...]]"


@dataclass(frozen=True)
class Graph:
    """A program as a value.

    Attributes:
        steps: in order: an input, or a step or fragment by name with the values it takes. Values are counted in the
            order in which they are made, inputs included.
        writes: (input, value) pairs: the input has the value's content at the end.
        outputs: the values returned.
        dynamic: whether the sizes that grow are symbols.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    dynamic: bool = False


@dataclass(frozen=True)
class Built:
    """A program's graph.

    Attributes:
        module: the program as lowering would leave it: sizes first, then tensors.
        environment: of its symbols. `symbols`: each one's size as drawn.
        layout: how to read off the arguments the symbols of strides and offsets.
        inputs: of the tensors.
        fragments: the name, operands and results of each.
    """

    program: Graph
    module: fx.GraphModule
    environment: ShapeEnv
    symbols: Mapping[sympy.Symbol, int]
    layout: Mapping[sympy.Symbol, Callable[[Sequence[Any]], int]]
    inputs: tuple[Input, ...]
    fragments: tuple[tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]], ...]

    def arguments(self, seed: int, lengths: Lengths = SAME) -> list[Any]:
        """The same ones for equal seeds: sizes, then tensors."""
        made: list[Tensor] = []
        for index, entry in enumerate(self.inputs):
            made.append(entry.make(self.program.dtype, seed + index, lengths, made))
        return [*(lengths.get(size, size) for size in self.symbols.values()), *made]

    def serves(self, lengths: Lengths) -> bool:
        """Whether the guards of building hold for these sizes."""
        values = {symbol: lengths.get(size, size) for symbol, size in self.symbols.items()}
        if self.layout:
            arguments = self.arguments(0, lengths)[len(self.symbols) :]
            values |= {symbol: read(arguments) for symbol, read in self.layout.items()}
        return all(guard.expr.xreplace(values) == sympy.true for guard in self.environment.guards)

    def exact(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The outputs and the inputs afterwards in float64, from arguments in any precision."""
        return _Exact(self).run(arguments)


def device_of(dtype: torch.dtype) -> str:
    """Half precision runs on the device, the only place where torch_npu quantizes."""
    return "npu" if dtype in HALVES else "cpu"


def build(program: Graph) -> Built:
    """The graph of a program."""
    draft = Draft(program.dtype, program.dynamic)
    for step in program.steps:
        draft.add(step)
    return draft.finish(program.outputs, program.writes)


class Draft:
    """A program under construction: its steps so far, its values (nodes, inputs included) and what they are."""

    def __init__(self, dtype: torch.dtype, dynamic: bool) -> None:
        self.dtype, self.dynamic = dtype, dynamic
        self.values: list[fx.Node] = []
        self.kinds: list[Kind] = []
        self.inputs: list[Input] = []
        self._steps: list[Step] = []
        self._graph = fx.Graph()
        self._environment = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._environment)
        self._mode.cache_enabled = not dynamic  # entries belong to an environment: none would be found again
        self._symbols: dict[sympy.Symbol, int] = {}
        self._layout: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}
        self._sizes: dict[sympy.Symbol, fx.Node] = {}
        self._tensors: list[fx.Node] = []
        self._drawn: list[Tensor] = []
        self._memory: list[int] = []
        self._fragments: list[tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]] = []

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        fakes, named = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with self._mode:
            value = target(*fakes, **named)
        node = self._graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def size(self, node: fx.Node, dimension: int) -> Any:
        size = node.meta["val"].shape[dimension]
        if isinstance(size, int):
            return size
        known = self._sizes.get(size.node.expr)
        return known if known is not None else self(torch.ops.aten.sym_size.int, node, dimension)

    def length(self, size: int) -> str:
        """A growing size as it is in a value's key."""
        symbols = (str(symbol) for symbol, drawn in self._symbols.items() if self.dynamic and drawn == size)
        return next(symbols, str(size))

    def add(self, step: Step) -> None:
        """Adds an input, or a step or fragment; its results are new values.

        Raises:
            RuntimeError: an operator does not take these operands; the graph is as it was.
        """
        if isinstance(step, tuple):
            self._call(*step)
        else:
            self._input(step)
        self._steps.append(step)

    def finish(self, outputs: Sequence[int], writes: Sequence[tuple[int, int]]) -> Built:
        """A program of the steps so far that writes inputs and returns values, of those given all that AOTAutograd
        would: each input once, what has memory of its own; no view of a written input. The draft stays as it is, so
        that it can be finished in another way too."""
        done = {target: source for target, source in reversed(writes) if self._may_be_written(target, source)}
        graph, drafted, copies = fx.Graph(), self._graph, dict[fx.Node, fx.Node]()
        graph.graph_copy(drafted, copies)
        self._graph = graph
        values = [(copies[self.values[target]], copies[self.values[source]]) for target, source in sorted(done.items())]
        for node, value in [(node, self._apart(value)) for node, value in values]:
            self(torch.ops.aten.copy_.default, node, value)
        self._graph = drafted
        written = {storage(node.meta["val"]) for node, _ in values}
        kept = [index for index in outputs if storage(self.values[index].meta["val"]) not in written]
        graph.output(tuple(copies[self.values[index]] for index in kept))
        program = Graph(tuple(self._steps), tuple(kept), tuple(sorted(done.items())), self.dtype, self.dynamic)
        fragments = tuple(
            (name, tuple(copies[node] for node in operands), tuple(copies[node] for node in results))
            for name, operands, results in self._fragments
        )
        return Built(
            program,
            _LazyGraphModule({}, graph),
            self._environment,
            self._symbols,
            self._layout,
            tuple(self.inputs),
            fragments,
        )

    def _may_be_written(self, target: int, source: int) -> bool:
        node, kind = self.values[target], self.kinds[target]
        shared = self._memory.count(storage(node.meta["val"])) > 1 or kind.overlaps
        return node.op == "placeholder" and kind.key == self.kinds[source].key and not shared

    def _apart(self, node: fx.Node) -> fx.Node:
        given = storage(node.meta["val"]) in self._memory
        return self(torch.ops.aten.clone.default, node) if given else node

    def _input(self, entry: Input) -> None:
        real = entry.make(self.dtype, 0, SAME, self._drawn)
        if isinstance(entry, Overlap):
            with self._mode:
                fake = PARTS[entry.part](self._tensors[entry.of].meta["val"])
        else:
            grows = [
                DimDynamic.DYNAMIC if one and self.dynamic else DimDynamic.STATIC for one in entry.grows(self.dtype)
            ]
            context = StatelessSymbolicContext(dynamic_sizes=grows)
            source = ConstantSource(f"x{len(self.inputs)}")
            fake = self._mode.from_tensor(real, symbolic_context=context, source=source)
        for size, drawn in zip(fake.shape, real.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in self._sizes:
                node = self._placeholder(f"size_{len(self._sizes)}", list(self._sizes.values()), size)
                self._sizes[size.node.expr], self._symbols[size.node.expr] = node, drawn
        self._note_layout(len(self.inputs), fake)
        node = self._placeholder(f"x{len(self.inputs)}", [*self._sizes.values(), *self._tensors], fake)
        self.inputs.append(entry)
        self._tensors.append(node)
        self._drawn.append(real)
        self._memory.append(storage(fake))
        self._value(node)

    def _note_layout(self, place: int, fake: Tensor) -> None:
        """Notes how to find the values of the symbols in an input's strides and offset."""
        found = [
            (fake.storage_offset(), lambda given: given[place].storage_offset()),
            *((stride, lambda given, at=at: given[place].stride(at)) for at, stride in enumerate(fake.stride())),
        ]
        for number, read in found:
            if isinstance(number, torch.SymInt) and number.node.expr.is_symbol:
                self._layout.setdefault(number.node.expr, read)

    def _placeholder(self, name: str, before: Sequence[fx.Node], value: object) -> fx.Node:
        with self._graph.inserting_after(before[-1]) if before else self._graph.inserting_before():
            node = self._graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _call(self, name: str, operands: tuple[int, ...]) -> None:
        nodes = [self.values[index] for index in operands]
        with self._undone():
            made = self._inlined(name, nodes) if name in fragments() else STEPS[name].emit(self, *nodes)
        results = [made] if isinstance(made, fx.Node) else list(made)
        if name in fragments():
            self._fragments.append((name, tuple(nodes), tuple(results)))
        for node in results:
            self._value(node)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Takes the calls out again if one of them fails."""
        count = len(self._graph.nodes)
        try:
            yield
        except RuntimeError:
            for node in list(reversed(self._graph.nodes))[: len(self._graph.nodes) - count]:
                self._graph.erase_node(node)
            raise

    def _inlined(self, name: str, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """The calls of a fragment, with these operands for its arguments."""
        graph = template(name, self.dtype)
        known: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            if node.target is torch.ops.aten.sym_size.int:
                known[node] = self.size(*args)
            elif isinstance(node.meta["val"], (int, torch.SymInt)) and not _nodes_in(args):
                known[node] = node.target(*args, **kwargs)
            else:
                known[node] = self(node.target, *args, **kwargs)
        return [known[node] for node in graph.output_node().args[0]]

    def _value(self, node: fx.Node) -> None:
        tensor = node.meta["val"]
        self.values.append(node)
        self.kinds.append(kind_of(tensor, storage(tensor) in self._memory))


def _nodes_in(args: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in tree_leaves(args))


@functools.cache
def template(name: str, dtype: torch.dtype) -> fx.Graph:
    """The calls of a fragment as lowering makes them, except that sizes are calls. Without AOTAutograd, which traces
    everything twice; test_graphs.py compares the two."""
    program = alone(name, dtype)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    arguments = zip(program.arguments(0), program.inputs, strict=True)
    fakes = [fake_input(mode, tensor, index, entry.grows) for index, (tensor, entry) in enumerate(arguments)]
    graph = _traced(program, mode, fakes)
    if any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in graph.nodes):
        graph = _traced(functionalize(program), mode, fakes)
    graph.eliminate_dead_code()
    return graph


def _traced(function: Callable[..., Any], mode: FakeTensorMode, fakes: Sequence[Tensor]) -> fx.Graph:
    with mode, torch.no_grad():
        return make_fx(lambda *given: list(function(*given)), _allow_non_fake_inputs=True)(*fakes).graph


@functools.cache
def example(fragment: str, dtype: torch.dtype) -> list[Tensor]:
    """What a fragment takes, to look at."""
    return fragments()[fragment].arguments(dtype, 0)


@functools.cache
def _drawn(fragment: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [item.to(device_of(dtype)) for item in fragments()[fragment].arguments(dtype, seed)]


class _Exact:
    """Runs a program in float64: its own calls with wide arguments, its fragments by what they mean."""

    def __init__(self, built: Built) -> None:
        self._graph = built.module.graph
        self._known: dict[fx.Node, Any] = {}
        self._fragment = {node: entry for entry in built.fragments for node in entry[2]}

    def run(self, arguments: Sequence[Any]) -> list[Tensor]:
        inputs = self._graph.find_nodes(op="placeholder")
        self._known = dict(zip(inputs, map(_wide, arguments), strict=True))
        results = [self._value(node).clone() for node in self._graph.output_node().args[0]]
        for node in self._graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            self._value(node.args[1])
        for node in self._graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            self._known[node.args[0]].copy_(self._value(node.args[1]))
        return [*results, *(self._known[node] for node in inputs if isinstance(self._known[node], Tensor))]

    def _value(self, node: fx.Node) -> Any:
        if node not in self._known:
            if node in self._fragment:
                name, operands, results = self._fragment[node]
                values = fragments()[name].exact(*map(self._value, operands))
                self._known.update(zip(results, values, strict=True))
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._value)
                self._known[node] = node.target(*args, **{name: _widened(name, item) for name, item in kwargs.items()})
        return self._known[node]


def _wide(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.to("cpu", torch.float64 if item.is_floating_point() else item.dtype, copy=True)


def _widened(name: str, item: Any) -> Any:
    if name == "dtype" and isinstance(item, torch.dtype) and item.is_floating_point:
        return torch.float64
    return torch.device("cpu") if name == "device" else item
