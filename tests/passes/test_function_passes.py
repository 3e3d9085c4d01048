"""Passes that are functions: each reason for which one may leave a program alone is the reason of a near miss."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_compiler.passes import (
    attention_exchange,
    common,
    constant_folding,
    dead_code,
    dual_batch_overlap,
    expert_communication,
    layer_sharding,
    noop,
    pipeline,
    qk_norm_rope,
    reinplace,
    sequence_parallel,
    shared_expert_rows,
    token_drop,
)
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.conditions import conditions, unexplained
from tests.passes.lowered import apply, lowered
from tests.properties.programs import written_operators

Program = Callable[..., object]
NearMiss = tuple[Program, tuple[Any, ...], str]
"""A program, what it is called with, and the reason. One without arguments that gives a graph is that graph."""
aten = torch.ops.aten


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    """Of the namespace npu_properties, which write their arguments."""
    with written_operators():
        yield


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotated(x: Tensor, cos: Tensor | float, sin: Tensor) -> Tensor:
    return x * cos + turned(x) * sin


def pair(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(q, cos, sin), rotated(k, cos, sin)


def chain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(rotated(x, cos, sin), cos, sin)


def halves_joined_along_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def neighbouring_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).view(x.shape)


def kept(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    other = turned(x)
    return x * cos + other * sin, other


def heads_of_two_sizes(table: Tensor, positions: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
    cos, sin = (part.unsqueeze(-2) for part in table.index_select(0, positions).chunk(2, dim=-1))
    out = []
    for x in (q, k):
        first, second = x[..., :8].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        out.append(torch.cat((turned, x[..., 8:]), dim=-1))
    return out


X, TABLE = ones(5, 4, 16), ones(5, 1, 16)
ROTATIONS: tuple[NearMiss, ...] = (
    (rotated, (X, TABLE, TABLE + 1), "no second tensor is rotated by the same cos and sin"),
    (chain, (X, TABLE, TABLE + 1), "no independent tensor is rotated by the same cos and sin"),
    (
        pair,
        (ones(2, 5, 4, 16), ones(1, 5, 1, 16), ones(1, 5, 1, 16), ones(1, 5, 4, 16)),
        "tokens of the pair, dimension 0: 2 is not 1",
    ),
    (
        heads_of_two_sizes,
        (ones(32, 8), torch.arange(5), ones(5, 4, 16), ones(5, 4, 32)),
        "head sizes of the pair: 16 is not 32",
    ),
    (lambda x, sin: rotated(x, 2.0, sin), (X, TABLE), "a number takes the place of cos, sin or the operand"),
    (
        lambda x, cos, sin: neighbours(x, cos, sin).flatten(-2),
        (X, ones(5, 1, 8), ones(5, 1, 8)),
        "neighbours are rotated by cos and sin that are not rows of a table",
    ),
    (
        lambda x, cos, sin: neighbours(x, cos, sin).flatten(1),
        (X, ones(5, 1, 8), ones(5, 1, 8)),
        "shape of the result: 2 and 3 dimensions",
    ),
    (neighbouring_heads, (X, TABLE, TABLE + 1), "neighbours are not taken along the head"),
    (rotated, (ones(5, 16), ones(5, 16), ones(5, 16)), "the rotated tensor has 2 dimensions"),
    (rotated, (X, ones(16), ones(16)), "cos and sin have another number of dimensions"),
    (halves_joined_along_heads, (X, ones(5, 1, 8), ones(5, 1, 8)), "halves are joined along dimension 1"),
    (
        rotated,
        (X, TABLE.double(), TABLE.double()),
        "dtypes torch.float32, torch.float64, torch.float64 are mixed",
    ),
    (rotated, (X, TABLE, ones(5, 1, 1)), "shapes of cos and sin, dimension 2: 16 is not 1"),
    (rotated, (X, ones(5, 4, 16), ones(5, 4, 16)), "cos along the heads"),
    (rotated, (X, ones(5, 1, 1), ones(5, 1, 1)), "cos along the head size: 1 is not 16"),
    (rotated, (X, ones(1, 1, 16), ones(1, 1, 16)), "cos along the tokens: 1 is not 5"),
    (kept, (X, TABLE, TABLE + 1), "is also used by output"),
    (
        pair,
        (ones(4, 5, 16).transpose(0, 1), TABLE, TABLE + 1, ones(4, 5, 16).transpose(0, 1)),
        "the rest of the program relies on the old one",
    ),
)
CONSTANTS: tuple[NearMiss, ...] = (
    (lambda x: (x + torch.arange(4.0).exp(), torch.arange(4.0).exp()), (X[..., :4],), ", and may write it"),
    (lambda x: x * torch.arange(4.0).sort(descending=True)[0], (X[..., :4],), "has several results"),
    (lambda x: x * torch.arange(3).sum(), (X.npu(),), "is in host memory, which a captured graph does not read"),
    (lambda x: x + torch.ones(4, 1 << 20) * 2, (ones(4, 1),), "would keep 16777216 bytes, allowed are 4194304"),
)


def by_hand(returned: int, inputs: int, *steps: tuple[Any, tuple[Any, ...], Any]) -> fx.GraphModule:
    """A graph of inputs [4, 8] and calls: each a target, its arguments (a node by its name), and what it gives: a
    tensor, or the name of the node that it writes."""
    graph, mode = fx.Graph(), FakeTensorMode()
    named: dict[str, fx.Node] = {}
    for index in range(inputs):
        node = named[f"x{index}"] = graph.placeholder(f"x{index}")
        with mode:
            node.meta["val"] = torch.empty(4, 8)
    for index, (target, args, result) in enumerate(steps):
        given = fx.node.map_aggregate(args, lambda item: named.get(item, item) if isinstance(item, str) else item)
        node = named[f"step{index}"] = graph.call_function(target, given)
        with mode:
            node.meta["val"] = named[result].meta["val"] if isinstance(result, str) else result()
    graph.output(tuple(list(named.values())[-returned:]))
    return fx.GraphModule({}, graph)


def matrix() -> Tensor:
    return torch.empty(4, 8)


def read_behind_a_write() -> fx.GraphModule:
    return by_hand(
        1,
        2,
        (aten.clone.default, ("x0",), matrix),
        (aten.add_.Tensor, ("x0", "x1"), "x0"),
        (aten.mul.Tensor, ("step0", "x1"), matrix),
    )


def equal_calls_round_a_write() -> fx.GraphModule:
    return by_hand(
        2,
        2,
        (aten.cos.default, ("x0",), matrix),
        (aten.add_.Tensor, ("x0", "x1"), "x0"),
        (aten.cos.default, ("x0",), matrix),
        (aten.sub.Tensor, ("step0", "step2"), matrix),
    )


def no_operator() -> fx.GraphModule:
    """A wrapped higher-order operator."""
    inner = torch.ops.higher_order.invoke_subgraph
    return by_hand(
        1,
        1,
        (auto_functionalized_v2, (inner,), lambda: (None, torch.empty(4, 8))),
        (operator.getitem, ("step0", 1), matrix),
    )


def twins(x: Tensor) -> tuple[Tensor, Tensor]:
    doubled = x * 2
    return doubled, doubled.view(4, 8)


Y = torch.arange(8.0)
NOOPS: tuple[NearMiss, ...] = (
    (lambda x: x.cpu() + 1, (torch.ones(4, 8).npu(),), "from npu:0 to cpu"),
    (lambda x: (x * 2).conj() * 3, (torch.ones(4, 8, dtype=torch.complex64),), "it resolves a conjugation or negation"),
    (lambda x: (x * 2)[:2].as_strided((2, 8), (8, 1), 16) + 1, (ones(4, 8),), "offset: 16 is not 0"),
    (
        lambda x: x.clone(memory_format=torch.contiguous_format),
        (ones(4, 1).t(),),
        "an output would get other strides in a dimension of size 1",
    ),
    (twins, (ones(4, 8),), "the caller gets both as tensors of their own"),
    (lambda x: x.clone(), (ones(4, 8),), "an output would come to share memory with an input"),
    (
        lambda x: (x * 2)[2:].clone().as_strided((2, 2), (1, 2), 0) + 1,
        (ones(8),),
        "the offset in memory would change, and as_strided counts from its start",
    ),
    (read_behind_a_write, (), "one of the two is written while the other is still read"),
    (lambda x: aten.constant_pad_nd.default(x * 2, [-1, 1]) + 1, (ones(4, 8),), "it moves the values"),
    (
        lambda x: aten.as_strided_scatter.default(x * 2, x * 3, [4, 4], [1, 4]) + 1,
        (ones(4, 4),),
        "it moves the values",
    ),
    (lambda x: (x * 2 + 0) * 3, (ones(4, 8),), "-0.0 + 0 is 0.0"),
    (lambda x: (x * 2 - -0.0) * 3, (ones(4, 8),), "-0.0 - -0.0 is 0.0"),
)
EQUAL: tuple[NearMiss, ...] = (
    (equal_calls_round_a_write, (), "what it reads is written between it and the equal call"),
    (lambda x: (x.cos(), x.cos()), (ones(4, 8),), "the caller gets it and the equal cos as separate tensors"),
)


def store(out: Tensor, x: Tensor) -> None:
    torch.ops.npu_properties.store(x, out)


def old_value_read(x: Tensor, y: Tensor) -> Tensor:
    old = x * 2
    return old + torch.select_scatter(old, y, 0, 0)


def offset_counts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    written = torch.select_scatter((x * 2)[2:], y, 0, 0)
    return written + 1, (x * 3).as_strided((2, 2), (1, 2), 0) + 1


def returned_between(x: Tensor, y: Tensor) -> Tensor:
    x[0] = y
    between = x.clone()
    x[0] = y + 1
    return between


def returned_twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    between = torch.select_scatter(x, y, 0, 0)
    x.copy_(torch.select_scatter(between, y, 0, 1))
    return between[0], between[1]


def read_behind_the_last_write(x: Tensor, y: Tensor) -> None:
    filled = torch.select_scatter(x, y, 0, 0)
    x.copy_(filled + 1)
    y.copy_(filled[1])


def reads_what_it_writes(x: Tensor, y: Tensor) -> Tensor:
    old = x * 2
    return torch.slice_scatter(old, old[:3], 0, 1, 4) + 1


def written_twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    one = x * 2
    other = one.clone()
    torch.ops.npu_properties.store_two(one, other, x)
    return one + 1, other + 1


def gaps() -> fx.GraphModule:
    """An operator that writes a copy of every second column of an input."""
    graph = lowered(store, ones(4, 16)[:, ::2], ones(4, 8), dynamic=True).graph
    (last,) = graph.graph.find_nodes(op="call_function", target=aten.copy_.default)
    graph.graph.erase_node(last)
    return graph


IN_PLACE: tuple[NearMiss, ...] = (
    (lambda x, y: torch.select_scatter(x, y, 0, 0), (ones(4, 8), Y), "is not the program's own, and must not change"),
    (lambda x, y: (y * 2).masked_fill(x > 5, 1.0) + 1, (ones(4, 8), Y), "before and after: shape"),
    (old_value_read, (ones(4, 8), Y), "the old value is read later, by add"),
    (offset_counts, (ones(4, 8), Y), "offset before and after: 16 is not 0"),
    (returned_between, (ones(4, 8), Y), "an output became an input's memory or another's"),
    (returned_twice, (ones(4, 8), Y), "is returned, and would share memory with"),
    (read_behind_the_last_write, (ones(4, 8), Y), ", behind the last write to"),
    (reads_what_it_writes, (ones(4, 8), Y), "is read from memory that the same call writes; it got a copy"),
    (written_twice, (ones(4, 8), Y), "is written through another argument too; it got a copy"),
    (gaps, (), "a base with gaps and symbolic sizes can't be copied here"),
    (no_operator, (), "is no operator, and stays functional"),
)
PASSES: tuple[tuple[ModuleType, tuple[NearMiss, ...]], ...] = (
    (qk_norm_rope, ROTATIONS),
    (constant_folding, CONSTANTS),
    (noop, NOOPS),
    (common, EQUAL),
    (reinplace, IN_PLACE),
)
WHERE = {reinplace: (reinplace.__name__, "npu_compiler.graph.holders")}
"""Modules whose conditions count as a pass's, if they are not its own alone."""
BEFORE = {reinplace: (noop,)}
"""Passes in front of one, without which it meets other programs."""


def copies(x: Tensor) -> Tensor:
    return x.clone().view(x.shape) + x[:]


def repeated(x: Tensor) -> Tensor:
    return (x + x) * (x + x)


def with_a_constant(x: Tensor) -> Tensor:
    return x + torch.arange(8).to(x.dtype) * 2


def written(x: Tensor) -> Tensor:
    return torch.slice_scatter(x + x, x[:2], 0, 1, 3)


EXAMPLES: dict[ModuleType, Program] = {
    noop: copies,
    common: repeated,
    constant_folding: with_a_constant,
    reinplace: written,
}
"""Of the passes that change no arithmetic; the files of qk_norm_rope and dead_code compare theirs."""
HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("module", EXAMPLES, ids=lambda module: module.NAME)
def test_fires_on_its_example_and_keeps_every_bit(module: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randint(-8, 9, (4, 8)).to(dtype)
    program = lowered(EXAMPLES[module], x).graph
    assert apply(Pass(module.NAME, "", module.run), program).fired
    (got,) = program(x.clone())
    expected = EXAMPLES[module](x)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


REASONS_ELSEWHERE = {
    module.NAME
    for module in (
        dead_code,
        sequence_parallel,
        attention_exchange,
        shared_expert_rows,
        layer_sharding,
        dual_batch_overlap,
        token_drop,
        expert_communication,
    )
}
ARITHMETIC_ELSEWHERE = REASONS_ELSEWHERE | {qk_norm_rope.NAME}
"""Passes that their own files run on an example, and whose refusals those files look at; dead_code refuses nothing."""


def test_every_pass_has_its_tests() -> None:
    """Each has a file. Rules are walked by test_rules.py, functions here, but for those named above."""
    names = {entry.name for entry in pipeline.PASSES} - {pipeline.USER_RULES}
    assert not {name for name in names if not (HERE / f"test_{name}.py").exists()}
    functions = {entry.name for entry in pipeline.PASSES if entry.run is not None}
    assert functions == {module.NAME for module in EXAMPLES} | ARITHMETIC_ELSEWHERE
    assert functions == {module.NAME for module, _ in PASSES} | REASONS_ELSEWHERE


FIRES_ELSEWHERE = (constant_folding, reinplace)
"""Passes that do something else in a near miss."""


def tried(module: ModuleType, program: Program, args: tuple[Any, ...]) -> tuple[list[str], PassRecord]:
    """Why the pass left alone what it looked at, and what it did. What noop sees at once to be needed, it does not
    report."""
    found = lowered(program, *args).graph if args else program()
    assert isinstance(found, fx.GraphModule)
    for earlier in BEFORE.get(module, ()):
        apply(Pass(earlier.NAME, "", earlier.run), found)
    silent = []
    if module is noop:
        pairs = [(node, noop.unchanged_argument(node)) for node in found.graph.nodes]
        silent = [noop.same_values(node, source).text for node, source in pairs if source is not None]
    record = apply(Pass(module.NAME, "", module.run), found)
    return [*silent, *(entry.reason for entry in record.refused)], record


@pytest.mark.parametrize(
    ("module", "program", "args", "reason"),
    [pytest.param(module, *miss, id=f"{module.NAME}-{miss[-1]}") for module, misses in PASSES for miss in misses],
)
def test_near_miss(module: ModuleType, program: Program, args: tuple[Any, ...], reason: str) -> None:
    given, record = tried(module, program, args)
    assert not record.fired or module in FIRES_ELSEWHERE, str(record)
    assert any(reason in one for one in given), given


@pytest.mark.parametrize(("module", "misses"), PASSES, ids=lambda value: getattr(value, "NAME", ""))
def test_every_condition_has_a_near_miss(module: ModuleType, misses: tuple[NearMiss, ...]) -> None:
    given = [reason for program, args, _ in misses for reason in tried(module, program, args)[0]]
    where = WHERE.get(module, (module.__name__,))
    asked = [condition for condition in conditions(module.run) if condition.where.rpartition(":")[0] in where]
    assert len(asked) >= len(misses) // 2, "the conditions were not found"
    open_ = unexplained(asked, given)
    assert not open_, open_
