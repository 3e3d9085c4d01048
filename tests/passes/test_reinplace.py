"""reinplace: writes go back in place where nobody reads the old value, and only there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from npu_compiler.passes import common, dead_code, noop, reinplace
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(reinplace.NAME, "", reinplace.run)


@pytest.fixture(scope="module")
def operators() -> Iterator[torch.library.Library]:
    """`written_into(x, out!)` and `add_to(x!, y)`: what vLLM's attention and cache operators look like."""
    with torch.library._scoped_library("reinplace_test", "DEF") as library:
        library.define("written_into(Tensor x, Tensor(a!) out) -> ()")
        library.define("add_to(Tensor(a!) x, Tensor y) -> ()")

        def written_into(x: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(x * 2)

        library.impl("written_into", written_into, "CompositeExplicitAutograd")
        library.impl("written_into", lambda x, out: None, "Meta")

        def add_to(x: torch.Tensor, y: torch.Tensor) -> None:
            x.zero_()  # an operator may write before it reads: an alias of x and y shows
            x.add_(y)

        library.impl("add_to", add_to, "CompositeExplicitAutograd")
        library.impl("add_to", lambda x, y: None, "Meta")
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
