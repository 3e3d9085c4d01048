"""Random programs over tensors, as values: how one is drawn, what it computes, how it is printed and traced.

A program is a list of steps over a growing list of tensors, the inputs first. It has views, writes into anything drawn
so far (inputs and views of inputs included), operators that write their arguments, blocks that the rules rewrite, and
outputs that may be inputs, views, or one tensor twice. Inputs may be one tensor twice, or overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.properties.draws import integers, one_of
from tests.properties.fragments import HALVES, Fragment, fragments
from tests.properties.graph_writes import NAMESPACE

COLUMNS = 8
"""Inputs that are no fragment's have rows of this length (a block needs an even one)."""


@contextmanager
def written_operators() -> Iterator[None]:
    """Operators that write arguments, as vLLM's attention and cache operators do: they zero what they write before they
    read the rest, so that an alias that should not be there shows."""
    with torch.library._scoped_library(NAMESPACE, "DEF") as library:
        library.define("store(Tensor x, Tensor(a!) out) -> ()")
        library.define("store_two(Tensor(a!) one, Tensor(b!) other, Tensor x) -> ()")
        library.define("accumulate(Tensor x, Tensor(a!) out) -> Tensor")

        def store(x: Tensor, out: Tensor) -> None:
            out.zero_()
            out.add_(x)

        def store_two(one: Tensor, other: Tensor, x: Tensor) -> None:
            one.zero_()
            other.zero_()
            one.add_(x)
            other.sub_(x)

        def accumulate(x: Tensor, out: Tensor) -> Tensor:
            before = out.clone()
            out.zero_()
            out.add_(x)
            return before + x

        for name, run in (("store", store), ("store_two", store_two), ("accumulate", accumulate)):
            library.impl(name, run, "CompositeExplicitAutograd")
            if name != "accumulate":
                library.impl(name, lambda *args: None, "Meta")
        library.impl("accumulate", lambda x, out: torch.empty_like(x + out), "Meta")
        yield


def _norm(x: Any, weight: Any) -> Any:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _store_into_clone(x: Any, y: Any) -> Any:
    copy = x.clone()
    getattr(torch.ops, NAMESPACE).store(y, copy)
    return copy


def _store_into_two_clones(x: Any, y: Any) -> Any:
    one, other = x.clone(), x.clone()
    getattr(torch.ops, NAMESPACE).store_two(one, other, y)
    return one + 2 * other


def _swiglu(x: Any) -> Any:
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]) * x[..., half:]


ONE: dict[str, Callable[[Any], Any]] = {
    "cos": lambda x: torch.cos(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "neg": lambda x: torch.neg(x),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "add_scalar": lambda x: x + 1,
    "scale": lambda x: x * 0.5,
    "bfloat16_and_back": lambda x: x.to(torch.float64).to(torch.float32),
    "softmax": lambda x: torch.softmax(x, -1),
    "silu": lambda x: torch.nn.functional.silu(x),
    "zeros_like": lambda x: torch.zeros_like(x),
    "swiglu": _swiglu,
    "sum_rows": lambda x: x.sum(-1, keepdim=True).expand(x.shape[0], x.shape[1]),
    "gram": lambda x: torch.tanh(x @ x.t()) @ x,
    "double_cat": lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    "cat_nothing": lambda x: torch.cat([x, x[..., :0]], -1),
    "pieces": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
}
"""Steps that make a tensor from one."""
VIEW: dict[str, Callable[[Any], Any]] = {
    "same": lambda x: x.view(x.shape[0], x.shape[1]),
    "double_transpose": lambda x: x.t().t(),
    "alias": lambda x: x.detach(),
    "first_rows": lambda x: x[:1],
    "every_row": lambda x: x[0:],
    "even_columns": lambda x: x[:, ::2],
    "left": lambda x: x.chunk(2, -1)[0],
    "right": lambda x: x.chunk(2, -1)[1],
    "row_again": lambda x: x[0].unsqueeze(0),
    "wide": lambda x: x[:1].expand(2, x.shape[1]),
    "flat": lambda x: x.reshape(1, -1),
}
"""Steps that make a view (or a copy, where a view is impossible)."""
TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: torch.tanh(x) * y,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "norm": lambda x, y: _norm(x, y[0]),
    "add_norm": lambda x, y: _norm(x + y, y[0]) + (x + y),
    "cat_half": lambda x, y: torch.cat([x, y], 0)[x.shape[0] :],
    "maximum": lambda x, y: torch.maximum(x, y),
    "store_into_clone": _store_into_clone,
    "store_into_two_clones": _store_into_two_clones,
}
"""Steps that make a tensor from two of one shape."""
WRITE_ONE: dict[str, Callable[[Any], Any]] = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(0.5),
    "zero_": lambda x: x.zero_(),
    "fill_row_": lambda x: x[0].fill_(2.0),
    "column_": lambda x: x[:, 0].add_(1),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([0], device=x.device), 3.0),
}
"""Steps that write a tensor."""
WRITE_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add_from_": lambda x, y: x.add_(y),
    "copy_": lambda x, y: x.copy_(y),
    "index_copy_": lambda x, y: x.index_copy_(0, torch.tensor([0], device=x.device), y[:1]),
    "index_put_": lambda x, y: x.index_put_((torch.tensor([0], device=x.device),), y[:1], accumulate=False),
    "store": lambda x, y: getattr(torch.ops, NAMESPACE).store(y, x),
    "store_rows": lambda x, y: getattr(torch.ops, NAMESPACE).store(y[:1], x[:1]),
    "store_clone": lambda x, y: getattr(torch.ops, NAMESPACE).store(y.clone(), x),
}
"""Steps that write the first of two tensors of one shape."""
WRITE_THREE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "store_two": lambda x, y, z: getattr(torch.ops, NAMESPACE).store_two(x, y, z),
}
NO_ALIAS = ("store", "store_rows", "store_two", "copy_")
"""Steps whose operands may not share memory: what a custom operator does with aliases of what it writes is its own, and
a copy of a tensor onto itself writes nothing."""
TABLES: dict[int, list[dict[str, Callable[..., Any]]]] = {
    1: [ONE, VIEW, WRITE_ONE],
    2: [TWO, WRITE_TWO],
    3: [WRITE_THREE],
}
STEPS: dict[str, Callable[..., Any]] = {**ONE, **VIEW, **TWO, **WRITE_ONE, **WRITE_TWO, **WRITE_THREE}
MAKES = {*ONE, *VIEW, *TWO}
MATRICES_ONLY = {"gram", "double_cat", "sum_rows", "wide", "same", "double_transpose", "norm", "add_norm"}
"""Steps that are written for two dimensions."""
ANY_SHAPE = {
    "clone",
    "contiguous",
    "alias",
    "neg",
    "zeros_like",
    "add_scalar",
    "add_",
    "zero_",
    "add",
    "maximum",
    "copy_",
}
"""Steps that take vectors too; everything between has two dimensions or more."""
WHOLE_NUMBERS = {"clone", "contiguous", "alias", "first_rows", "every_row", "same", "double_transpose"}
"""Steps that take quantized values."""
JUMPS = {"where", "bfloat16_and_back"}
"""Steps that make much of one rounding, or end in float32: not for programs in half precision."""


LAYOUTS: dict[str, tuple[Callable[[int], tuple[int, int]], Callable[[Tensor, int], Tensor]]] = {
    "": (lambda rows: (rows + 2, COLUMNS), lambda base, rows: base[:rows]),
    "transposed": (lambda rows: (COLUMNS, rows), lambda base, rows: base.t()),
    "strided": (lambda rows: (rows, 2 * COLUMNS), lambda base, rows: base[:, ::2]),
    "gaps": (lambda rows: (rows, COLUMNS + 3), lambda base, rows: base[:, :COLUMNS]),
}
"""For each layout of an input the shape of what it is a view of, and the view."""


@dataclass(frozen=True)
class Input:
    """One argument: `rows` of its own (`of` is None) in a layout, `rows` of another one from row `start` on, or all of
    it; or what a fragment takes in a place."""

    rows: int
    of: int | None = None
    start: int = 0
    whole: bool = False
    fragment: str = ""
    place: int = 0
    grows: bool = True
    layout: str = ""


@dataclass(frozen=True)
class Program:
    """`steps` are (name, indices of operands); `outputs` are indices into the list of tensors."""

    inputs: tuple[Input, ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        return self._run(list(arguments), exact=False)

    def exact(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The same in float64; the arguments are written in float64 too."""
        return self._run(list(arguments), exact=True)

    def _run(self, values: list[Any], exact: bool) -> tuple[Any, ...]:
        for step in self.steps:
            values += run_step(step, values, exact)
        return tuple(values[index] for index in self.outputs)

    @property
    def device(self) -> str:
        """Half precision runs on the device, the only place where torch_npu quantizes."""
        return "npu" if self.dtype in HALVES else "cpu"

    def arguments(self, seed: int, device: str = "", more_rows: int = 0, exact: bool = False) -> list[Tensor]:
        """Inputs with the program's aliases, equal for equal seeds; those that grow are `more_rows` longer than drawn.

        Args:
            device: the program's own if not given.
            exact: the same values in float64.
        """
        generator = torch.Generator().manual_seed(seed)
        made: list[Tensor] = []
        for index, entry in enumerate(self.inputs):
            more = more_rows if entry.grows else 0
            if entry.fragment:
                made.append(self._moved(self._of_fragment(entry, seed + index, more), device, exact))
            elif entry.of is None:
                shape, view = LAYOUTS[entry.layout]
                base = torch.randn(shape(entry.rows + more), generator=generator).to(self.dtype)
                made.append(view(self._moved(base, device, exact), entry.rows + more))
            elif entry.whole:
                made.append(made[entry.of])
            else:
                source = made[entry.of]
                made.append(torch.as_strided(source, (entry.rows + more, COLUMNS), (COLUMNS, 1), entry.start * COLUMNS))
        return made

    def _of_fragment(self, entry: Input, seed: int, more: int) -> Tensor:
        given = fragments()[entry.fragment].arguments(self.dtype, seed)[entry.place]
        return torch.cat([given] * (1 + more), 0)[: given.shape[0] + more] if more else given

    def _moved(self, tensor: Tensor, device: str, exact: bool) -> Tensor:
        wide = exact and tensor.is_floating_point()
        return tensor.to("cpu" if exact else device or self.device, torch.float64 if wide else tensor.dtype)

    def __str__(self) -> str:
        lines = [f"x{i} = {entry}" for i, entry in enumerate(self.inputs)]
        count = len(self.inputs)
        for name, operands in self.steps:
            call = f"{name}({', '.join(f'x{index}' for index in operands)})"
            results = count_results(name)
            made = ", ".join(f"x{count + index}" for index in range(results))
            lines.append(f"{made} = {call}" if made else call)
            count += results
        return "\n".join([*lines, f"return {', '.join(f'x{index}' for index in self.outputs)}", repr(self)])


def run_step(step: tuple[str, tuple[int, ...]], values: Sequence[Any], exact: bool = False) -> list[Any]:
    """The tensors that a step makes; none if it only writes."""
    name, operands = step
    given = [values[index] for index in operands]
    if name in fragments():
        return (fragments()[name].exact if exact else fragments()[name])(*given)
    result = STEPS[name](*given)
    return [result] if name in MAKES else []


def count_results(name: str) -> int:
    """How many tensors a step makes."""
    return fragments()[name].results if name in fragments() else int(name in MAKES)


def traced(program: Program, sizes: Sequence[str] = ()) -> fx.GraphModule:
    """The program in torch's own functions and methods, as dynamo would give it: sizes are inputs that come first."""
    graph = fx.Graph()
    for name in sizes:
        graph.placeholder(name)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(len(program.inputs))]
    results = program(*proxies)
    graph.output(tuple(result.node for result in results))
    return fx.GraphModule({}, graph)


@st.composite
def programs(draw: st.DrawFn, max_steps: int = 10, first: str = "") -> Program:
    """Programs whose every step is valid: they are run while they are drawn, and a step that eager refuses (a copy
    between tensors that overlap in part) becomes a clone.

    Args:
        first: the fragment that is the first step; drawn like the others if not given.
    """
    dtypes = [torch.float32, torch.float32, *HALVES]
    dtype = draw(one_of([one for one in dtypes if not first or one in fragments()[first].dtypes]))
    inputs = draw(_inputs())
    values = Program(tuple(inputs), (), (), dtype).arguments(seed=0)
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(draw(integers(1, max_steps))):
        if (first and not steps) or draw(integers(0, 2)) == 0:
            misses = draw(integers(0, 3)) == 0
            fitting = sorted(name for name, one in fragments().items() if dtype in one.dtypes and one.miss == misses)
            name = first if first and not steps else draw(one_of(fitting))
            more, step = draw(_fragment_step(fragments()[name], dtype, values, len(inputs)))
            if more:
                steps = [(name, tuple(_behind(index, len(inputs), len(more)) for index in old)) for name, old in steps]
                values[len(inputs) : len(inputs)] = Program(tuple(more), (), (), dtype).arguments(seed=0)
                inputs += more
        else:
            step = draw(_step(values, dtype))
        try:
            made = run_step(step, values)
        except RuntimeError:
            step = ("clone", step[1][:1])
            made = run_step(step, values)
        values += made
        steps.append(step)
    outputs = draw(st.lists(integers(0, len(values) - 1), min_size=1, max_size=4))
    last = len(values) - 1
    return Program(tuple(inputs), tuple(steps), tuple(outputs if last in outputs else [*outputs, last]), dtype)


def _behind(index: int, inputs: int, more: int) -> int:
    """The index of a value after `more` inputs have been put behind the first `inputs` ones."""
    return index + more if index >= inputs else index


@st.composite
def _fragment_step(
    draw: st.DrawFn, fragment: Fragment, dtype: torch.dtype, values: Sequence[Tensor], inputs: int
) -> tuple[list[Input], tuple[str, tuple[int, ...]]]:
    """A fragment's step and the inputs that it needs anew: each operand is one, or a value of the same kind that is
    there already (so that fragments form chains, and operands repeat)."""
    example = fragment.arguments(dtype, 0)
    rows = _rows(example)
    more: list[Input] = []
    chosen: list[tuple[bool, int]] = []
    for place, like in enumerate(example):
        fits = [
            index
            for index, value in enumerate(values)
            if value.shape == like.shape and value.dtype == like.dtype == dtype and value.device == like.device
        ]
        if fits and draw(integers(0, 3)):
            chosen.append((False, max(draw(one_of(fits)), draw(one_of(fits)))))
        else:
            chosen.append((True, inputs + len(more)))
            grows = like.dim() > 1 and like.shape[0] == rows
            more.append(Input(like.shape[0], fragment=fragment.name, place=place, grows=grows))
    operands = tuple(index if new else _behind(index, inputs, len(more)) for new, index in chosen)
    return more, (fragment.name, operands)


def alone(fragment: str, dtype: torch.dtype) -> Program:
    """A fragment as a whole program."""
    one = fragments()[fragment]
    example = one.arguments(dtype, 0)
    rows = _rows(example)
    inputs = [
        Input(like.shape[0], fragment=fragment, place=place, grows=like.dim() > 1 and like.shape[0] == rows)
        for place, like in enumerate(example)
    ]
    results = range(len(inputs), len(inputs) + one.results)
    return Program(tuple(inputs), ((fragment, tuple(range(len(inputs)))),), tuple(results), dtype)


def _rows(example: Sequence[Tensor]) -> int:
    """The size that grows: the first one of the first argument that is no vector; 0 if all are vectors."""
    return next((item.shape[0] for item in example if item.dim() > 1), 0)


@st.composite
def _inputs(draw: st.DrawFn) -> Sequence[Input]:
    inputs: list[Input] = []
    for index in range(draw(integers(1, 3))):
        dense = [place for place, entry in enumerate(inputs) if not entry.layout]
        kind = draw(one_of(["own", "own", "own", "same", *["overlap"][: len(dense)]])) if index else "own"
        if kind == "own":
            layout = draw(one_of([*[""] * 5, *LAYOUTS]))
            inputs.append(Input(draw(one_of([2, 3, 4])), layout=layout))
        elif kind == "same":
            of = draw(integers(0, index - 1))
            inputs.append(Input(inputs[of].rows, of, whole=True, layout=inputs[of].layout))
        else:
            inputs.append(Input(2, draw(one_of(dense)), draw(integers(0, 2))))
    return inputs


@st.composite
def _step(draw: st.DrawFn, values: Sequence[Tensor], dtype: torch.dtype) -> tuple[str, tuple[int, ...]]:
    """A step that takes its operands' shapes. Later values are drawn more often: programs are chains, not bushes."""
    first = max(draw(integers(0, len(values) - 1)), draw(integers(0, len(values) - 1)))
    kind = (values[first].shape, values[first].dtype)
    like = [index for index, value in enumerate(values) if (value.shape, value.dtype) == kind]
    arity = draw(one_of([1, 1, 1, 2, 2, 2, 3]))
    table = draw(one_of(TABLES[arity]))
    name = draw(one_of(sorted(table)))
    operands = (first, *(draw(one_of(like)) for _ in range(arity - 1)))
    if _takes(name, [values[index] for index in operands], dtype):
        return name, operands
    return "clone", operands[:1]


def _takes(name: str, values: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the step may be applied: blocks and halves need even columns, a write needs memory of its own for every
    element, and some writes operands that share none."""
    dimensions, columns = values[0].dim(), values[0].shape[-1]
    if not values[0].is_floating_point():
        return name in WHOLE_NUMBERS and (dimensions == 2 or name not in MATRICES_ONLY)
    if (dimensions < 2 and name not in ANY_SHAPE) or (dimensions != 2 and name in MATRICES_ONLY):
        return False
    if dtype in HALVES and name in JUMPS:
        return False
    if name in ("swiglu", "left", "right", "pieces", "even_columns") and columns % 2:
        return False
    written = values[:2] if name in WRITE_THREE else values[:1] if name not in MAKES else ()
    if any(0 in value.stride() for value in written):
        return False
    if name in NO_ALIAS and len({value.untyped_storage()._cdata for value in values}) < len(values):
        return False
    return not (name == "flat" and values[0].numel() > 4 * COLUMNS)
