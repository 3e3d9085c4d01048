"""Running a program eagerly and through stages of the compiler, and comparing all that a caller can see."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import AttrSource, ConstantSource, TensorProperty, TensorPropertySource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_compiler.config import Options
from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import Pass
from npu_compiler.plan.order import arrange
from tests.properties.fragments import HALVES
from tests.properties.programs import Program, traced
from tests.properties.streams import interleavings

SEED = 1
MORE_ROWS = 3
ROUNDINGS = 4
"""How many times the error of the eager program one in half precision may have, and how many roundings on top."""


Strides: TypeAlias = "list[tuple[int, ...]]"
"""Of each output."""


class Seen:
    """What a caller sees of a call: the outputs' values and strides, the inputs afterwards, and who shares memory."""

    def __init__(self, run: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
        with torch.no_grad():
            outputs = list(run(*arguments))
        self.values = [tensor.cpu() for tensor in (*outputs, *arguments)]
        self.strides = [tensor.stride() for tensor in outputs]
        self.memory = _partition([*outputs, *arguments])

    def assert_same(
        self,
        expected: Seen,
        stage: str,
        exact: Callable[[], Sequence[Tensor]] | None = None,
        promised: Callable[[], list[Strides]] | None = None,
    ) -> None:
        """Compares with `expected`.

        Args:
            exact: the values in float64. Those that differ by more than float32's rounding have to be as near to these
                as the expected ones.
            promised: other strides that the outputs may have (see `promised_strides`), in several ways.
        """
        outputs = len(self.strides)
        for position, (got, want) in enumerate(zip(self.values, expected.values, strict=True)):
            what = f"output {position}" if position < outputs else f"input {position - outputs} afterwards"
            if (got.dtype, got.shape) == (want.dtype, want.shape) and _close(got, want):
                continue
            if exact is None:
                torch.testing.assert_close(
                    got, want, rtol=1e-4, atol=1e-4, msg=lambda text, what=what: f"{stage}: {what}: {text}"
                )
            else:
                _assert_as_near(got, want, exact()[position], f"{stage}: {what}")
        if self.strides != expected.strides:
            ways = [expected.strides, *(promised() if promised else [])]
            for got, *allowed in zip(self.strides, *ways, strict=True):
                assert got in allowed, f"{stage}: strides {self.strides}, allowed are {ways}"
        assert self.memory == expected.memory, f"{stage}: other outputs and inputs share memory than in eager"


def promised_strides(run: Callable[..., Any], arguments: Sequence[Any]) -> Strides:
    """The strides of a call's outputs as fake tensors have them. torch_npu's kernels return dense tensors where torch
    says that the strides follow the operands' (`a.transpose(1, 2) * b`); what is compiled may keep to either."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        results = run(*(_faked(mode, item) for item in arguments))
        return [tensor.stride() for tensor in (results if isinstance(results, (list, tuple)) else (results,))]


def _faked(mode: FakeTensorMode, item: Any) -> Any:
    return mode.from_tensor(item, static_shapes=True) if isinstance(item, Tensor) else item


def _close(got: Tensor, want: Tensor) -> bool:
    if torch.equal(got, want):
        return True
    single = got.dtype in (torch.float32, torch.float64)
    return single and torch.allclose(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def _assert_as_near(got: Tensor, eager: Tensor, exact: Tensor, what: str) -> None:
    """The compiled program may round elsewhere than the eager one, but not be wrong by more."""
    assert (got.dtype, got.shape) == (eager.dtype, eager.shape), what
    finite = eager.isfinite() & exact.isfinite()
    assert bool(got[finite].isfinite().all()), f"{what} is not finite where eager is"
    if not bool(finite.any()):
        return
    whole = not got.is_floating_point()
    rounding = 0.0 if whole else torch.finfo(got.dtype).eps
    got, eager, exact = (tensor[finite].double() for tensor in (got, eager, exact))
    allowed = whole + ROUNDINGS * (float((eager - exact).abs().max()) + rounding * float(exact.abs().max()))
    error = float((got - exact).abs().max())
    assert error <= allowed, f"{what}: error {error} against float64; eager has {float((eager - exact).abs().max())}"


def _partition(tensors: Sequence[Tensor]) -> list[int]:
    """For every tensor the first one that it shares its storage with."""
    first: dict[int, int] = {}
    return [
        first.setdefault(tensor.untyped_storage().data_ptr(), index) if tensor.numel() else -1
        for index, tensor in enumerate(tensors)
    ]


class Lowered:
    """A program after lowering, before the passes. `call` runs whatever stands in `module`, on tensors alone."""

    def __init__(self, program: Program, dynamic: bool) -> None:
        self.shape_env = ShapeEnv()
        mode = FakeTensorMode(shape_env=self.shape_env)
        arguments = program.arguments(SEED)
        grows = {id(tensor): entry.grows for tensor, entry in zip(arguments, program.inputs, strict=True)}
        fakes: dict[int, Tensor] = {}
        for index, tensor in enumerate(arguments):
            if id(tensor) not in fakes:
                fakes[id(tensor)] = fake_input(mode, tensor, index, dynamic and grows[id(tensor)])
        inputs = [fakes[id(tensor)] for tensor in arguments]
        self._sizes = _sizes(inputs)
        self.module: fx.GraphModule | None = None
        self.arguments: list[Any] = []

        def finish(functional: Functional) -> Callable[..., Any]:
            self.functional = functional.graph
            return lambda *args: self._run(*args)

        graph = traced(program, [f"size_{count}" for count in range(len(self._sizes))])
        with torch.no_grad():
            self._call = lower(graph, [*(size for size, _ in self._sizes), *inputs], finish)

    def _run(self, *args: Any) -> Any:
        assert self.module is not None
        if not self.arguments:
            self.arguments = [_copied(item) for item in args]
        return self.module(*args)

    def call(self, *arguments: Tensor) -> Any:
        return self._call(*(read(arguments) for _, read in self._sizes), *arguments)

    def serves(self, arguments: Sequence[Tensor]) -> bool:
        """Whether the guards that lowering added hold for these arguments."""
        values = {
            symbol: _value(self.shape_env.var_to_sources[symbol][0], arguments)
            for guard in self.shape_env.guards
            for symbol in guard.expr.free_symbols
        }
        return all(guard.expr.subs(values) == sympy.true for guard in self.shape_env.guards)


def _value(source: TensorPropertySource, arguments: Sequence[Tensor]) -> int:
    """A size, a stride or the offset of an input, or of the tensor that it is a view of."""
    base = source.base
    of_base = isinstance(base, AttrSource)
    name = base.base.source_name if of_base else base.source_name
    tensor = arguments[int(name.removeprefix("x"))]
    tensor = tensor._base if of_base else tensor
    match source.prop:
        case TensorProperty.SIZE:
            return tensor.size(source.idx)
        case TensorProperty.STRIDE:
            return tensor.stride(source.idx)
        case TensorProperty.STORAGE_OFFSET:
            return tensor.storage_offset()


def _copied(item: Any) -> Any:
    """A tensor of the same layout in memory of its own."""
    if not isinstance(item, Tensor):
        return item
    storage = item.untyped_storage().clone()
    return torch.empty(0, dtype=item.dtype, device=item.device).set_(
        storage, item.storage_offset(), item.size(), item.stride()
    )


def interpreted(graph: fx.Graph, *given: Any) -> Any:
    """Calls a graph as its generated code would. A graph that is run once or twice is not worth the code."""
    inputs = iter(given)
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = next(inputs)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], known.__getitem__)
        else:
            assert node.op == "call_function", f"{node.format_node()} is no call of a function"
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without an output")


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A program to run passes on: new nodes, the same fake values. Its text is made when it is run."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return _LazyGraphModule(module, graph)


def fake_input(mode: FakeTensorMode, tensor: Tensor, index: int, dynamic: bool) -> Tensor:
    """The input `index` of a program; if `dynamic`, its first size is a symbol."""
    sizes = [DimDynamic.STATIC] * tensor.dim()
    sizes[0] = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"x{index}"))


def _sizes(inputs: Sequence[Tensor]) -> list[tuple[torch.SymInt, Callable[[Sequence[Tensor]], int]]]:
    """The symbols of the inputs' sizes, strides and offsets, each with how to read its value off real arguments."""
    found: dict[Any, tuple[torch.SymInt, Callable[[Sequence[Tensor]], int]]] = {}
    for index, fake in enumerate(inputs):
        for size, read in (
            (fake.shape[0], lambda arguments, index=index: arguments[index].shape[0]),
            (fake.storage_offset(), lambda arguments, index=index: arguments[index].storage_offset()),
            *(
                (stride, lambda arguments, index=index, at=at: arguments[index].stride(at))
                for at, stride in enumerate(fake.stride())
            ),
        ):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (size, read))
    return list(found.values())


class Check:
    """Runs one program through the stages and compares each with eager.

    Stages that leave the program as it was are not run again: the text that would run is the same.

    Attributes:
        fired: how often each rule, or pass, fired.
        compared: how many programs were compared with eager.
    """

    def __init__(self, program: Program, dynamic: bool) -> None:
        self.fired: Counter[str] = Counter()
        self.compared = 0
        self._program = program
        self._lowered = Lowered(program, dynamic)
        lengths = [
            more
            for more in ((0, MORE_ROWS) if dynamic else (0,))
            if self._lowered.serves(program.arguments(SEED, more_rows=more))
        ]
        assert 0 in lengths, "the guards don't hold for what the program was lowered for"
        self._expected = {more: Seen(program, program.arguments(SEED, more_rows=more)) for more in lengths}
        self._lowered_strides: dict[int, Strides] = {}
        self._exact: dict[int, Seen] = {}
        if program.dtype in HALVES:
            exact = {more: program.arguments(SEED, more_rows=more, exact=True) for more in lengths}
            self._exact = {more: Seen(program.exact, given) for more, given in exact.items()}

    def all_stages(self) -> None:
        """After lowering, after every prefix of the pipeline, without every single pass, in another order of calls, and
        on several streams."""
        base = copied(self._lowered.functional)
        self._compare(base, "lowered")
        order = pipeline.selected(Options())
        module, before = self._prefixes(base, order)
        for name, (index, snapshot) in before.items():
            self._without(name, snapshot, order[index:])
        arrange(module.graph)
        module.recompile()
        self._compare(module, "in the order that needs least memory")
        for text, interleaved in interleavings(module):
            self._compare(interleaved, f"on several streams, {text}")

    def with_outputs(self, seed: int) -> None:
        """After every prefix of the pipeline, with other values of the program returned, drawn by `seed`: the lowered
        program says what is right."""
        module = copied(self._lowered.functional)
        draw = random.Random(seed)
        output = module.graph.output_node()
        output.args = (tuple(_can_be_returned(module.graph, draw)[: draw.randint(1, 4)]),)
        module.recompile()
        expected = self._run_alone(module)
        check, text = SpecCheck(module), module.code
        for entry in pipeline.selected(Options()):
            self._run_pass(entry, module, check)
            if module.code != text:
                text = module.code
                stage = f"other outputs {seed}, after the prefix up to {entry.name}"
                self._run_alone(module).assert_same(expected, stage)
                self.compared += 1

    def _prefixes(
        self, base: fx.GraphModule, order: Sequence[Pass]
    ) -> tuple[fx.GraphModule, dict[str, tuple[int, fx.GraphModule]]]:
        """The program behind the passes, and for each pass that changed it the program before."""
        module, check, before = copied(base), SpecCheck(base), {}
        for index, entry in enumerate(order):
            snapshot, text = copied(module), module.code
            self._run_pass(entry, module, check)
            if module.code != text:
                before.setdefault(entry.name, (index, snapshot))
                self._compare(module, f"after the prefix up to {entry.name}")
        return module, before

    def _without(self, name: str, module: fx.GraphModule, rest: Sequence[Pass]) -> None:
        for entry in rest:
            if entry.name != name:
                pipeline.run_pass(entry, module, Options())
        self._compare(module, f"without {name}")

    def _run_pass(self, entry: Pass, module: fx.GraphModule, check: SpecCheck) -> None:
        environment = self._lowered.shape_env
        guards = len(environment.guards)
        record = pipeline.run_pass(entry, module, Options(), check)
        self.fired.update(fired.rule.split(":")[0] for fired in record.fired)
        assert len(environment.guards) == guards, f"{entry.name} added a guard"

    def _compare(self, module: fx.GraphModule, stage: str) -> None:
        self._lowered.module = module
        for more, want in self._expected.items():
            got = Seen(self._lowered.call, self._program.arguments(SEED, more_rows=more))
            self._lowered_strides.setdefault(more, got.strides)
            exact = self._exact.get(more)
            got.assert_same(
                want,
                f"{stage}, {more} more rows",
                None if exact is None else lambda: exact.values,  # noqa: B023
                functools.partial(self._promised, more),
            )
        self.compared += 1

    def _promised(self, more: int) -> list[Strides]:
        """Those of the lowered program, before any pass: `x.add_(1)` keeps the strides of x, and the functional call
        that AOTAutograd makes of it need not (`index_copy` returns a dense tensor). On the device the fake ones too."""
        promised = [self._lowered_strides[more]]
        if self._program.dtype in HALVES:
            promised.append(promised_strides(self._program, self._program.arguments(SEED, more_rows=more)))
        return promised

    def _run_alone(self, module: fx.GraphModule) -> Seen:
        given = [_copied(item) for item in self._lowered.arguments]
        inputs = [item for item in given if isinstance(item, Tensor)]
        return Seen(lambda *_: module(*given), inputs)


def _can_be_returned(graph: fx.Graph, draw: random.Random) -> list[fx.Node]:
    """Tensors in memory of their own, in an order drawn: views that are returned AOTAutograd makes itself."""
    taken = {storage(tensor) for node in graph.nodes if node.op != "call_function" for tensor in tensors(node)}
    found = []
    for node in draw.sample(nodes := list(graph.nodes), len(nodes)):
        memory = {storage(tensor) for tensor in tensors(node)}
        if isinstance(node.meta.get("val"), Tensor) and node.op == "call_function" and not memory & taken:
            found.append(node)
            taken |= memory
    return found


def check_all_stages(program: Program, dynamic: bool, other_outputs: Sequence[int] = ()) -> Check:
    """Eager equals the program at every stage.

    Args:
        dynamic: whether the rows' counts are symbols; then longer inputs are compared too.
        other_outputs: seeds of what is returned instead, each a program of its own; only in float32, as the lowered
            program rounds too.
    """
    check = Check(program, dynamic)
    check.all_stages()
    for seed in other_outputs if program.dtype is torch.float32 else ():
        check.with_outputs(seed)
    return check
