"""reinplace: writes go back in place where nobody reads the old value, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from npu_compiler.lowering.functional import Functional, lower
from npu_compiler.passes import common, dead_code, noop, reinplace
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(reinplace.NAME, "", reinplace.run)


class Compiled:
    """A function behind the passes up to reinplace, run with Dynamo's convention on copies of its arguments.

    Attributes:
        calls: the operators of the program.
        record: what reinplace did.
    """

    def __init__(self, function: Callable[..., Any], *given: Tensor, dynamic: bool = False) -> None:
        self.calls: list[str] = []
        self.record = PassRecord("")

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return lower(gm, inputs, self._finish)

        torch._dynamo.reset()
        expected, got = ([item.clone() for item in given] for _ in range(2))
        with torch.no_grad():
            want = function(*expected)
            result = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*got)
        torch.testing.assert_close(result, want)
        torch.testing.assert_close(got, expected)  # the inputs afterwards

    def _finish(self, functional: Functional) -> Callable[..., Any]:
        for module in (noop, common, dead_code):
            apply(Pass(module.NAME, "", module.run), functional.graph)
        self.record = apply(PASS, functional.graph)
        self.calls = calls(functional.graph)
        return functional.graph.forward

    @property
    def reasons(self) -> str:
        return "\n".join(refused.reason for refused in self.record.refused)


@pytest.fixture(scope="module")
def operators() -> Iterator[torch.library.Library]:
    """`written_into(x, out!)` and `add_to(x!, y)`: what vLLM's attention and cache operators look like."""
    with torch.library._scoped_library("reinplace_test", "DEF") as library:
        library.define("written_into(Tensor x, Tensor(a!) out) -> ()")
        library.define("add_to(Tensor(a!) x, Tensor y) -> ()")
        library.define("add_both(Tensor(a!) x, Tensor(b!)? z, Tensor y, *, float scale=1.0) -> Tensor")
        library.define("add_all(Tensor(a!)[] xs, Tensor y) -> (Tensor, Tensor)")

        def written_into(x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(x * 2)

        library.impl("written_into", written_into, "CompositeExplicitAutograd")
        library.impl("written_into", lambda x, out: None, "Meta")

        def add_to(x: torch.Tensor, y: torch.Tensor) -> None:
            x.zero_()  # an operator may write before it reads: an alias of x and y shows
            x.add_(y)

        def add_both(x: Tensor, z: Tensor | None, y: Tensor, *, scale: float = 1.0) -> Tensor:
            x.add_(y, alpha=scale)
            if z is not None:
                z.sub_(y)
            return y * scale

        def add_all(xs: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
            for index, x in enumerate(xs):
                x.add_(y, alpha=index + 1)
            return y + 1, y + 2

        library.impl("add_to", add_to, "CompositeExplicitAutograd")
        library.impl("add_to", lambda x, y: None, "Meta")
        library.impl("add_both", add_both, "CompositeExplicitAutograd")
        library.impl("add_both", lambda x, z, y, scale=1.0: torch.empty_like(y), "Meta")
        library.impl("add_all", add_all, "CompositeExplicitAutograd")
        library.impl("add_all", lambda xs, y: (torch.empty_like(y), torch.empty_like(y)), "Meta")
        yield library


def test_output_buffer_is_written_in_place(operators: torch.library.Library) -> None:
    """Before: empty, auto_functionalized_v2 (a clone of the buffer). After: empty, the operator itself."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops.reinplace_test.written_into(x, out)
        return out + 1

    x = torch.randn(4, 8)
    program = lowered(attend, x)
    assert "auto_functionalized_v2" in calls(program.graph)
    record = apply(PASS, program.graph)
    assert calls(program.graph) == [
        "aten.empty_like.default",
        "reinplace_test.written_into.default",
        "aten.add.Tensor",
    ]
    assert [fired.rule for fired in record.fired] == ["reinplace: reinplace_test.written_into.default"]
    assert torch.equal(program.graph(x)[0], x * 2 + 1)


def test_value_read_later_is_cloned(operators: torch.library.Library) -> None:
    def twice(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = x.exp()
        b = a.clone()
        torch.ops.reinplace_test.add_to(b, y)
        return a, b

    x, y = torch.randn(4), torch.randn(4)
    program = lowered(twice, x, y)
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    apply(PASS, program.graph)
    a, b = program.graph(x, y)
    assert torch.equal(a, x.exp())
    assert torch.equal(b, y)


def test_call_that_reads_what_it_writes_gets_a_copy(operators: torch.library.Library) -> None:
    """`op(clone(x), x)` must not become `op(x, x)` (pytorch issue 198031)."""

    def overlapping(x: torch.Tensor) -> torch.Tensor:
        a = x.exp()
        b = a.clone()
        torch.ops.reinplace_test.add_to(b, a)
        return b * 2

    x = torch.randn(4)
    program = lowered(overlapping, x)
    for entry in (Pass(noop.NAME, "", noop.run), Pass(dead_code.NAME, "", dead_code.run)):
        apply(entry, program.graph)
    record = apply(PASS, program.graph)
    assert torch.equal(program.graph(x)[0], x.exp() * 2)
    assert any("read from memory that the same call writes" in refused.reason for refused in record.refused)


def test_input_mutation_needs_no_copy(operators: torch.library.Library) -> None:
    def update(cache: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.ops.reinplace_test.add_to(cache, y)
        return y + 1

    cache, y = torch.zeros(8), torch.randn(8)
    program = lowered(update, cache, y)
    apply(PASS, program.graph)
    assert "aten.clone.default" not in calls(program.graph)
    assert "aten.copy_.default" not in calls(program.graph)
    cache.zero_()
    program.graph(
        *(cache if tuple(fake.shape) == (8,) and index == 0 else y for index, fake in enumerate(program.inputs))
    )
    assert torch.equal(cache, y)


def test_index_copy_into_a_cache() -> None:
    def write(cache: torch.Tensor, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, position, key)
        return cache.sum()

    cache, position, key = torch.zeros(2, 8, 4), torch.tensor([1, 5]), torch.randn(2, 2, 4)
    program = lowered(write, cache.clone(), position, key)
    apply(PASS, program.graph)
    assert calls(program.graph) == ["aten.index_copy_.default", "aten.sum.default"]
    expected = cache.clone().index_copy_(1, position, key)
    assert torch.equal(program.graph(cache, position, key)[0], expected.sum())
    assert torch.equal(cache, expected)


def test_index_copy_whose_old_value_is_read_stays() -> None:
    def write(cache: torch.Tensor, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return cache.exp().index_copy(0, position, key) + cache.exp()

    cache, position, key = torch.randn(8, 4), torch.tensor([1, 5]), torch.randn(2, 4)
    program = lowered(write, cache, position, key)
    apply(Pass(common.NAME, "", common.run), program.graph)
    apply(PASS, program.graph)
    assert "aten.index_copy.default" in calls(program.graph)
    assert torch.equal(program.graph(cache, position, key)[0], write(cache, position, key))


def test_count_that_is_updated() -> None:
    def step(x: Tensor, count: Tensor) -> Tensor:
        places = torch.arange(3) + count
        count += 3
        return x[places]

    program = Compiled(step, torch.rand(8), torch.tensor(2))
    assert program.calls.count("aten.add_.Tensor") == 1
    assert "aten.copy_.default" not in program.calls


def test_count_whose_old_value_is_read_later_is_copied_back() -> None:
    def step(x: Tensor, count: Tensor) -> Tensor:
        before = count.clone()
        count += 3
        return x[torch.arange(3) + before + count]

    program = Compiled(step, torch.rand(16), torch.tensor(2))
    assert program.calls[-1] == "aten.copy_.default"
    assert "the old value is read later" in program.reasons


def test_sum_of_two_inputs_is_no_update() -> None:
    def step(x: Tensor, y: Tensor) -> None:
        x.copy_(y + x)

    program = Compiled(step, torch.rand(8), torch.rand(8))
    assert program.calls == ["aten.add.Tensor", "aten.copy_.default"]


def test_index_put_into_a_cache(operators: torch.library.Library) -> None:
    def write(cache: torch.Tensor, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        cache[position] = key
        return cache.sum()

    cache, position, key = torch.zeros(8, 4), torch.tensor([1, 5]), torch.randn(2, 4)
    program = lowered(write, cache.clone(), position, key)
    record = apply(PASS, program.graph)
    assert any("index_put" in fired.rule for fired in record.fired)
    assert "aten.copy_.default" not in calls(program.graph)
    expected = cache.clone()
    expected[position] = key
    assert torch.equal(program.graph(cache, position, key)[0], expected.sum())
    assert torch.equal(cache, expected)


def test_returned_copy_of_a_written_input_stays_a_copy() -> None:
    """`x[0] = y; return x.clone()`: noop drops the clone, so the input would come back as the output."""

    def write(cache: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        cache[0] = y
        return cache.clone()

    cache, y = torch.zeros(4, 8), torch.randn(8)
    program = lowered(write, cache.clone(), y)
    apply(Pass(noop.NAME, "", noop.run), program.graph)
    record = apply(PASS, program.graph)
    (returned,) = program.graph(cache, y)
    assert torch.equal(returned, cache)
    assert torch.equal(cache[0], y)
    cache.zero_()
    assert torch.equal(returned[0], y)
    assert any("became an input's memory" in refused.reason for refused in record.refused)


ROWS, COLUMNS = torch.arange(32.0).reshape(8, 4), torch.arange(100.0, 104.0)


def write_row(x: Tensor, y: Tensor) -> None:
    x[3] = y


def write_nested(x: Tensor, y: Tensor) -> None:
    x[2:6][1, :2] = y[:2]


def write_diagonal(x: Tensor, y: Tensor) -> None:
    x[:4].diagonal().copy_(y)


def write_strided(x: Tensor, y: Tensor) -> None:
    x.as_strided((4,), (5,), 1).copy_(y)


def write_twice(x: Tensor, y: Tensor) -> None:
    x[0] = y
    x[1] = y + 1
    x[0] = x[0] + x[1]


def write_row_of_itself(x: Tensor, y: Tensor) -> None:
    x[0] = x[1]


def masked(x: Tensor, y: Tensor) -> None:
    x.masked_fill_(x > 7, 3.0)


def added(x: Tensor, y: Tensor) -> None:
    x.index_add_(0, torch.tensor([1, 1]), torch.stack((y, y)))


def scattered(x: Tensor, y: Tensor) -> None:
    x.scatter_(0, torch.tensor([[0, 1, 2, 3]]), y[None])


def through_a_view(x: Tensor, y: Tensor) -> None:
    x.view(4, 8)[torch.tensor([1])] = torch.cat((y, y))[None]


@pytest.mark.parametrize(
    "function, copies",
    [
        (write_row, 1),
        (write_nested, 1),
        (write_diagonal, 1),
        (write_strided, 1),
        (write_twice, 3),
        (write_row_of_itself, 1),
        (masked, 0),
        (added, 0),
        (scattered, 0),
        (through_a_view, 0),
    ],
)
def test_writes_into_an_input_are_in_place(function: Callable[..., None], copies: int) -> None:
    """Nothing but the part is copied, and no new value of the whole is made."""
    compiled = Compiled(function, ROWS, COLUMNS)
    assert compiled.calls.count("aten.copy_.default") == copies
    assert not any("scatter.default" in name or name in ("aten.clone.default",) for name in compiled.calls)
    assert compiled.record.fired
    assert not compiled.record.refused


def shifted_in_itself(x: Tensor, y: Tensor) -> None:
    x[1:] = x[:-1].clone()


def value_before(x: Tensor, y: Tensor) -> Tensor:
    before = x * 1.5
    old = before.clone()
    old[0] = y
    return before + old


def input_that_stays(x: Tensor, y: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([1]), 2.0)


def transposed_back(x: Tensor, y: Tensor) -> None:
    square = x[:4]
    square.copy_(square.masked_fill(square > 5, 1.0).t())


def two_inputs_from_one(x: Tensor, y: Tensor) -> None:
    filled = x.masked_fill(x > 5, 1.0)
    x.copy_(filled + 1)
    y.copy_(filled[0])


def returned_between(x: Tensor, y: Tensor) -> Tensor:
    x[0] = 1
    between = x.clone()
    x[0] = 2
    return between


def narrowed_broadcast(x: Tensor, y: Tensor) -> Tensor:
    return (y * 2).masked_fill(x > 5, 1.0) + 1


@pytest.mark.parametrize(
    "function, reason",
    [
        (shifted_in_itself, "is read from memory that the same call writes; it got a copy"),
        (value_before, "the old value is read later, by add"),
        (input_that_stays, "is not the program's own, and must not change"),
        (two_inputs_from_one, ""),
        (transposed_back, ""),
        (returned_between, "an output became an input's memory or another's, or is written again; it got a copy"),
        (narrowed_broadcast, "before and after: shape: 1 and 2 dimensions"),
    ],
)
def test_near_misses(function: Callable[..., Any], reason: str) -> None:
    compiled = Compiled(function, ROWS, COLUMNS)
    assert reason in compiled.reasons


def test_parts_that_do_not_overlap_are_written_beside_those_that_are_read() -> None:
    """k is written in place while q, another part of the same memory, is read later."""

    def halves(x: Tensor) -> Tensor:
        packed = x * 2
        packed[:, 2:] = packed[:, 2:] + 1
        return packed.sum(0)

    compiled = Compiled(halves, ROWS, dynamic=True)
    assert not any("scatter" in name for name in compiled.calls)
    assert not compiled.record.refused


@pytest.mark.parametrize("version", [1, 2])
def test_wrapped_operators_with_results_lists_and_views(operators: torch.library.Library, version: int) -> None:
    """Both forms of the wrapper, with results of the operator's own, None, keywords and lists."""

    def program_of(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.reinplace_test
        a, b, c = x * 2, x * 3, x * 4
        first = ops.add_both(a, None, y, scale=2.0)
        second = ops.add_both(b, c, first)
        third, fourth = ops.add_all([a, b, x], second)
        return a, b, c, third - fourth

    with torch._inductor.config.patch(enable_auto_functionalized_v2=version == 2):
        compiled = Compiled(program_of, ROWS, COLUMNS)
    assert compiled.calls.count("reinplace_test.add_both.default") == 2
    assert compiled.calls.count("reinplace_test.add_all.default") == 1
    assert "aten.clone.default" not in compiled.calls
    assert "aten.copy_.default" not in compiled.calls


def test_result_of_a_wrapped_operator_that_is_read_later_stays(operators: torch.library.Library) -> None:
    def program_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = torch.ops.reinplace_test.add_both(x * 2, None, y)
        return torch.select_scatter(result, y[0] + 1, 0, 0), result.sin()

    compiled = Compiled(program_of, ROWS, COLUMNS)
    assert "aten.select_scatter.default" in compiled.calls
    assert "the old value is read later" in compiled.reasons


@pytest.mark.parametrize("part", [(slice(2, 6),), (slice(None), slice(1, 3)), (slice(0, 8, 2),), (slice(None),)])
def test_wrapped_operator_that_gets_a_view(operators: torch.library.Library, part: tuple[slice, ...]) -> None:
    def program_of(x: Tensor, y: Tensor) -> Tensor:
        whole = x * 2
        view = whole[part]
        torch.ops.reinplace_test.add_to(view, view * 3)
        return whole + 1

    compiled = Compiled(program_of, ROWS, COLUMNS)
    assert "aten.clone.default" not in compiled.calls


def test_one_argument_is_copied_where_a_call_writes_a_tensor_twice(operators: torch.library.Library) -> None:
    def program_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = x * 2
        b = a.clone()
        torch.ops.reinplace_test.add_both(a, b, y)
        return a, b

    compiled = Compiled(program_of, ROWS, COLUMNS)
    assert compiled.calls.count("aten.clone.default") == 1
    assert "it got a copy" in compiled.reasons


def test_copy_of_a_strided_input_keeps_its_place_in_memory(operators: torch.library.Library) -> None:
    """What the call gets is a view counted from the start of memory; the copy starts where the input starts."""

    def program_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        old = x * 1.5
        view = old.t()[1:3]
        kept = old.clone()
        torch.ops.reinplace_test.add_to(view, view * 3)
        return old, kept

    Compiled(program_of, ROWS, COLUMNS)
