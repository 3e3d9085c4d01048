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

NAMESPACE = "npu_properties"
COLUMNS = 8
"""Every input has rows of this length (a block needs an even one)."""


@contextmanager
def written_operators() -> Iterator[None]:
    """Operators that write arguments, as vLLM's attention and cache operators do: they zero what they write before they
    read the rest, so that an alias that should not be there shows."""
    with torch.library._scoped_library(NAMESPACE, "DEF") as library:
        library.define("store(Tensor x, Tensor(a!) out) -> ()")
        library.define("store_two(Tensor(a!) one, Tensor(b!) other, Tensor x) -> ()")

        def store(x: Tensor, out: Tensor) -> None:
            out.zero_()
            out.add_(x)

        def store_two(one: Tensor, other: Tensor, x: Tensor) -> None:
            one.zero_()
            other.zero_()
            one.add_(x)
            other.sub_(x)

        for name, run in (("store", store), ("store_two", store_two)):
            library.impl(name, run, "CompositeExplicitAutograd")
            library.impl(name, lambda *args: None, "Meta")
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
    "cat_nothing": lambda x: torch.cat([x, x[:, :0]], -1),
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


@dataclass(frozen=True)
class Input:
    """One argument: a tensor of its own (`of` is None), or `rows` of another one from row `start` on, or all of it."""

    rows: int
    of: int | None = None
    start: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Program:
    """`steps` are (name, indices of operands); `outputs` are indices into the list of tensors."""

    inputs: tuple[Input, ...]
    steps: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[int, ...]

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        values = list(arguments)
        for name, operands in self.steps:
            result = STEPS[name](*(values[index] for index in operands))
            if name in MAKES:
                values.append(result)
        return tuple(values[index] for index in self.outputs)

    def arguments(self, seed: int, device: str = "cpu", more_rows: int = 0) -> list[Tensor]:
        """Inputs with the program's aliases, equal for equal seeds; every input is `more_rows` longer than drawn."""
        generator = torch.Generator().manual_seed(seed)
        made: list[Tensor] = []
        for entry in self.inputs:
            if entry.of is None:
                base = torch.randn(entry.rows + more_rows + 2, COLUMNS, generator=generator).to(device)
                made.append(base[: entry.rows + more_rows])
            elif entry.whole:
                made.append(made[entry.of])
            else:
                source = made[entry.of]
                rows = torch.as_strided(source, (entry.rows + more_rows, COLUMNS), (COLUMNS, 1), entry.start * COLUMNS)
                made.append(rows)
        return made

    def __str__(self) -> str:
        lines = [f"x{i} = {entry}" for i, entry in enumerate(self.inputs)]
        count = len(self.inputs)
        for name, operands in self.steps:
            call = f"{name}({', '.join(f'x{index}' for index in operands)})"
            lines.append(f"x{count} = {call}" if name in MAKES else call)
            count += name in MAKES
        return "\n".join([*lines, f"return {', '.join(f'x{index}' for index in self.outputs)}", repr(self)])


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
def programs(draw: st.DrawFn, max_steps: int = 10) -> Program:
    """Programs whose every step is valid: they are run while they are drawn, and a step that eager refuses (a copy
    between tensors that overlap in part) becomes a cosine."""
    inputs = draw(_inputs())
    values = Program(tuple(inputs), (), ()).arguments(seed=0)
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(1, max_steps))):
        step = draw(_step(values))
        try:
            result = _run(step, values)
        except RuntimeError:
            step = ("cos", step[1][:1])
            result = _run(step, values)
        if step[0] in MAKES:
            values.append(result)
        steps.append(step)
    outputs = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))
    last = len(values) - 1
    return Program(tuple(inputs), tuple(steps), tuple(outputs if last in outputs else [*outputs, last]))


def _run(step: tuple[str, tuple[int, ...]], values: Sequence[Tensor]) -> Any:
    return STEPS[step[0]](*(values[index] for index in step[1]))


@st.composite
def _inputs(draw: st.DrawFn) -> Sequence[Input]:
    inputs: list[Input] = []
    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["own", "own", "own", "same", "overlap"])) if index else "own"
        of = draw(st.integers(0, index - 1)) if kind != "own" else None
        if kind == "own":
            inputs.append(Input(draw(st.sampled_from([2, 3, 4]))))
        elif kind == "same":
            assert of is not None
            inputs.append(Input(inputs[of].rows, of, whole=True))
        else:
            inputs.append(Input(2, of, draw(st.integers(0, 2))))
    return inputs


@st.composite
def _step(draw: st.DrawFn, values: Sequence[Tensor]) -> tuple[str, tuple[int, ...]]:
    """A step that takes its operands' shapes. Later values are drawn more often: programs are chains, not bushes."""
    first = max(draw(st.integers(0, len(values) - 1)), draw(st.integers(0, len(values) - 1)))
    like = [index for index, value in enumerate(values) if value.shape == values[first].shape]
    arity = draw(st.sampled_from([1, 1, 1, 2, 2, 2, 3]))
    table = draw(st.sampled_from(TABLES[arity]))
    name = draw(st.sampled_from(sorted(table)))
    operands = (first, *(draw(st.sampled_from(like)) for _ in range(arity - 1)))
    if _takes(name, [values[index] for index in operands]):
        return name, operands
    return ("cos", operands[:1]) if arity == 1 else ("add", operands[:2])


def _takes(name: str, values: Sequence[Tensor]) -> bool:
    """Whether the step may be applied: blocks and halves need even columns, a write needs memory of its own for every
    element, and some writes operands that share none."""
    columns = values[0].shape[1]
    if name in ("swiglu", "left", "right", "pieces", "even_columns") and columns % 2:
        return False
    written = values[:2] if name in WRITE_THREE else values[:1] if name not in MAKES else ()
    if any(0 in value.stride() for value in written):
        return False
    if name in NO_ALIAS and len({value.untyped_storage()._cdata for value in values}) < len(values):
        return False
    return not (name == "flat" and columns > 4 * COLUMNS)
