"""Orders of calls: the least memory wins, effects stay in order, results stay the same."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, reject, settings
from torch import fx

from npu_compiler.plan import memory
from npu_compiler.plan.order import PROGRAM, arrange
from tests.plan.programs import Program, programs

aten = torch.ops.aten


def wasteful() -> fx.GraphModule:
    """All large values are made first and reduced afterwards; one by one needs a fraction."""
    program = Program(inputs=1, side=64)
    large = [program.add(aten.sin.default, program.values[0]) for _ in range(6)]
    total = program.add(aten.sum.default, large[0])
    for value in large[1:]:
        total = program.add(aten.add.Tensor, total, program.add(aten.sum.default, value))
    return program.done([total])


def test_less_memory_wins() -> None:
    module = wasteful()
    before = memory.plan(module.graph, "cpu").live({})
    expected = module(torch.ones(64, 64))
    found = arrange(module.graph, "cpu")
    module.recompile()
    after = memory.plan(module.graph, "cpu").live({})
    assert found.winner != PROGRAM and found.winner in str(found)
    assert found.peaks[found.winner] == after == min(found.peaks.values())
    assert found.peaks[PROGRAM] == before > 3 * after
    torch.testing.assert_close(module(torch.ones(64, 64)), expected)


def test_nothing_moves_where_nothing_is_won() -> None:
    program = Program(inputs=1)
    value = program.values[0]
    for _ in range(5):
        value = program.add(aten.sin.default, value)
    module = program.done([value])
    before = [node.name for node in module.graph.nodes]
    assert arrange(module.graph, "cpu").winner == PROGRAM
    assert [node.name for node in module.graph.nodes] == before


def test_draws_and_writes_keep_their_order() -> None:
    program = Program(inputs=1, side=64)
    x = program.values[0]
    draws = [program.add(aten.rand_like.default, x) for _ in range(4)]
    reads = [program.add(aten.sum.default, x)]
    writes = [program.add(aten.add_.Tensor, x, draw) for draw in draws]
    reads.append(program.add(aten.sum.default, x))
    module = program.done([*reads, program.add(aten.sum.default, writes[-1])])
    arrange(module.graph, "cpu")
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for chain in (draws, writes):
        assert sorted(chain, key=order.__getitem__) == chain
    assert order[reads[0]] < order[writes[0]] and order[writes[-1]] < order[reads[1]]


@settings(max_examples=60)
@given(programs(largest=20))
def test_results_are_the_same_and_memory_is_no_more(module: fx.GraphModule) -> None:
    inputs = [torch.rand(8, 8, dtype=torch.float64) for _ in module.graph.find_nodes(op="placeholder")]
    mine, theirs = copy.deepcopy(inputs), copy.deepcopy(inputs)
    before = memory.plan(module.graph, "cpu").live({})
    module.recompile()
    try:
        expected = module(*mine)
    except RuntimeError as error:  # x.add_(x.t()), which PyTorch refuses
        assert "single memory location" in str(error)
        reject()
    text = str(arrange(copy.deepcopy(module).graph, "cpu"))
    assert str(arrange(module.graph, "cpu")) == text, "the same program gives the same order"
    module.recompile()
    assert memory.plan(module.graph, "cpu").live({}) <= before
    for got, wanted in zip([*module(*theirs), *theirs], [*expected, *mine], strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
