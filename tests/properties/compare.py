"""Running a program eagerly and through stages of the compiler, and comparing all that a caller can see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from npu_compiler.config import Options
from npu_compiler.graph.spec import SpecCheck
from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import pipeline, reinplace
from tests.properties.programs import Program, traced

SEED = 1


class Seen:
    """What a caller sees of a call: the outputs' values and strides, the inputs afterwards, and who shares memory."""

    def __init__(self, run: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
        with torch.no_grad():
            outputs = list(run(*arguments))
        self.values = [tensor.cpu() for tensor in (*outputs, *arguments)]
        self.strides = [tensor.stride() for tensor in outputs]
        self.memory = _partition([*outputs, *arguments])

    def assert_same(self, expected: Seen, stage: str) -> None:
        outputs = len(self.strides)
        for position, (got, want) in enumerate(zip(self.values, expected.values, strict=True)):
            what = f"output {position}" if position < outputs else f"input {position - outputs} afterwards"
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda text, what=what: f"{stage}: {what}: {text}"
            )
        assert self.strides == expected.strides, stage
        assert self.memory == expected.memory, f"{stage}: other outputs and inputs share memory than in eager"


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
        fakes: dict[int, Tensor] = {}
        for index, tensor in enumerate(arguments):
            if id(tensor) not in fakes:
                fakes[id(tensor)] = _fake(mode, tensor, index, dynamic)
        inputs = [fakes[id(tensor)] for tensor in arguments]
        self._sizes = _sizes(inputs)
        self.module: fx.GraphModule | None = None

        def finish(functional: Functional) -> Callable[..., Any]:
            self.functional = functional.graph
            return lambda *args: self._run(*args)

        graph = traced(program, [f"size_{count}" for count in range(len(self._sizes))])
        with torch.no_grad():
            self._call = lower(graph, [*(size for size, _ in self._sizes), *inputs], finish)

    def _run(self, *args: Any) -> Any:
        assert self.module is not None
        return self.module(*args)

    def call(self, *arguments: Tensor) -> Any:
        return self._call(*(read(arguments) for _, read in self._sizes), *arguments)

    def serves(self, arguments: Sequence[Tensor]) -> bool:
        """Whether the guards that lowering added hold for these arguments."""
        values = {size.node.expr: read(arguments) for size, read in self._sizes}
        return all(guard.expr.subs(values) == sympy.true for guard in self.shape_env.guards)

    def copy(self) -> fx.GraphModule:
        """The functional program, to run passes on: new nodes, the same fake values."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.functional.graph, {}))
        return fx.GraphModule(self.functional, graph)


def _fake(mode: FakeTensorMode, tensor: Tensor, index: int, dynamic: bool) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"x{index}"))


def _sizes(inputs: Sequence[Tensor]) -> list[tuple[torch.SymInt, Callable[[Sequence[Tensor]], int]]]:
    """The symbols of the inputs' sizes and offsets, each with how to read its value off real arguments."""
    found: dict[Any, tuple[torch.SymInt, Callable[[Sequence[Tensor]], int]]] = {}
    for index, fake in enumerate(inputs):
        for size, read in (
            (fake.shape[0], lambda arguments, index=index: arguments[index].shape[0]),
            (fake.storage_offset(), lambda arguments, index=index: arguments[index].storage_offset()),
        ):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (size, read))
    return list(found.values())


def check_all_stages(program: Program, dynamic: bool, without: Sequence[str] | None = None) -> int:
    """Eager equals the program after every prefix of the pipeline, and with every single pass left out.

    Args:
        dynamic: whether the rows' counts are symbols; then longer inputs are compared too.
        without: the passes to leave out, one at a time; all if not given.

    Returns:
        How many programs were compared with eager.
    """
    lowered = Lowered(program, dynamic)
    lengths = [
        more for more in ((0, 3) if dynamic else (0,)) if lowered.serves(program.arguments(SEED, more_rows=more))
    ]
    expected = {more: Seen(program, program.arguments(SEED, more_rows=more)) for more in lengths}
    compared = 0

    def compare(module: fx.GraphModule, stage: str) -> None:
        nonlocal compared
        lowered.module = module
        for more, want in expected.items():
            Seen(lowered.call, program.arguments(SEED, more_rows=more)).assert_same(want, f"{stage}, {more} more rows")
        compared += 1

    options = Options()
    order = pipeline.selected(options)
    module = lowered.copy()
    compare(module, "lowered")
    check = SpecCheck(module)
    for entry in order:
        guards = len(lowered.shape_env.guards)
        pipeline.run_pass(entry, module, options, check)
        # Inductor's overlap analysis decides by comparing sizes and guards on the answer
        assert entry.name == reinplace.NAME or len(lowered.shape_env.guards) == guards, f"{entry.name} added a guard"
        compare(module, f"after the prefix up to {entry.name}")
    for name in dict.fromkeys(pipeline.names(order)) if without is None else without:
        module = lowered.copy()
        pipeline.run(module, Options(disabled_passes=(name,)))
        compare(module, f"without {name}")
    return compared
