"""Ten wrong rewrites. Each is given to torch.compile by its name, fires several times, and is wrong at one of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any as Anything

import torch
from torch import Tensor, fx
from torch.nn.functional import silu

from npu_compiler import Pass, Rule
from npu_compiler.facts.sizes import Fact, known
from npu_compiler.graph.build import call
from npu_compiler.passes.pattern import Any, Call, Match, Number
from npu_compiler.passes.record import PassRecord
from npu_compiler.passes.rewrite import Build
from tests.inspect.planted import operators as operators  # registers them

aten = torch.ops.aten
HERE = "tests.inspect.planted.defects"


def rule(name: str, pattern: Call, replacement: Callable[[Build, Match], fx.Node], **more: Anything) -> Rule:
    """A rule without what only the project's own tests of rules use."""
    return Rule(name, pattern=pattern, replacement=replacement, reference=torch.relu, example=lambda dtype: (), **more)


def tensor(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).npu()


@dataclass(frozen=True)
class Defect:
    """What is planted, and what is to be found.

    Attributes:
        program, arguments: what is compiled. `options`: with the wrong rule or pass among them, by name.
        layer, stage, rule: where it is. `line`: part of the source line of the match that is wrong.
        shows: part of what is said of it.
        confirmed: whether everything is right without the rule; None for what a function does.
        calls: at most so many calls are left when it is made smaller.
    """

    program: Callable[..., Anything]
    arguments: Callable[[], Sequence[Tensor]]
    options: Mapping[str, Anything]
    rule: str
    line: str
    shows: str
    layer: str = "pass"
    stage: str = "planted"
    confirmed: bool | None = True
    calls: int = 3


# Wrong fusion: gate and up change places where they are wide.


def _gate(build: Build, match: Match) -> fx.Node:
    gate, up = match.node("gate"), match.node("up")
    wide = match.tensor("gate").shape[-1] > 32
    return build(aten.mul.Tensor, build(aten.silu.default, up if wide else gate), gate if wide else up)


FUSION = Pass(
    "planted",
    "an activation and the product behind it",
    rules=(
        rule("gated", Call("aten.mul.Tensor", Call("aten.silu.default", Any("gate")), Any("up"), commutes=True), _gate),
    ),
    before="swiglu",
    local=True,
)


RIGHT_FUSION = dataclasses.replace(
    FUSION,
    rules=tuple(
        dataclasses.replace(
            entry,
            replacement=lambda build, match: build(
                aten.mul.Tensor, build(aten.silu.default, match.node("gate")), match.node("up")
            ),
        )
        for entry in FUSION.rules
    ),
)


def gates(x: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    h = silu(x @ narrow) * x
    g = h @ wide
    return (silu(g) * (g + 1.0)).sum(-1, keepdim=True) + h


# Wrong alias: a copy is dropped whose source is written later.


def _share(module: fx.GraphModule, record: PassRecord) -> None:
    for node in module.graph.find_nodes(op="call_function", target=aten.clone.default):
        record.fire("needless_copy", node, [node])
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)


ALIAS = Pass("planted", "drops copies", _share, after="reinplace", local=True)


def copies(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.t().clone(memory_format=torch.contiguous_format) @ x
    before = cache.clone()
    cache.add_(1.0)
    return wide, before


# Missing event: a call that writes what others read, and says nothing of it.

EVENT = Pass(
    "planted",
    "a product by three",
    rules=(
        rule(
            "tripled",
            Call("aten.mul.Tensor", Any("x"), Number("by")),
            lambda build, match: build(torch.ops.planted.tripled.default, match.node("x")),
            legal=lambda match: known(match.bindings["by"] == 3.0, "not by three"),
        ),
    ),
    before="mul_add",
    local=True,
)


def branches(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    shared = x + 1.0
    left = torch.relu(shared @ weight)
    for _ in range(3):
        left = torch.relu(left @ weight)
    right = shared * 3.0
    for _ in range(4):
        right = (right * 1.5).sin()
    return left, right


# Wrong padding: an inner dimension is filled up with ones.


def _pad(build: Build, match: Match) -> fx.Node:
    x, weight = match.node("x"), match.node("weight")
    missing = -match.tensor("x").shape[-1] % 16
    wide = build(aten.constant_pad_nd.default, x, [0, missing], 1.0)
    return build(aten.mm.default, wide, build(aten.constant_pad_nd.default, weight, [0, 0, 0, missing], 1.0))


PADDING = Pass(
    "planted",
    "matrix products with an inner dimension that is a multiple of 16",
    rules=(rule("padded", Call("aten.mm.default", Any("x"), Any("weight")), _pad),),
    before="matmul_bias",
    local=True,
)


def products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    h = torch.relu(torch.mm(x, first))
    return torch.tanh(torch.mm(h, second))


# Stale output: a result that is kept from the call before.

STALE = Pass(
    "planted",
    "tanh",
    rules=(
        rule(
            "kept",
            Call("aten.tanh.default", Any("x")),
            lambda build, match: build(torch.ops.planted.kept_tanh.default, match.node("x")),
            legal=lambda match: known(match.tensor("x").shape[-1] == 8, "not eight"),
        ),
    ),
    before="mul_add",
    local=True,
)


def squashed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x) + torch.tanh(torch.tanh(x) @ weight).sum(-1, keepdim=True)


# Reordered collective: a sum over the ranks goes in front of another one.


def _early(module: fx.GraphModule, record: PassRecord) -> None:
    sums = module.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default)
    for first, second in itertools.pairwise(sums):
        source = second.args[0]
        if all(other.op == "placeholder" for other in source.all_input_nodes):
            record.fire("early_sum", second, [second])
            first.prepend(source)
            first.prepend(second)


COLLECTIVE = Pass("planted", "sums begin early", _early, before="mul_add", local=True)


def summed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    functional = torch.ops._c10d_functional
    left = functional.wait_tensor(functional.all_reduce(torch.relu(x), "sum", "0"))
    right = functional.wait_tensor(functional.all_reduce(torch.sigmoid(y), "sum", "0"))
    return torch.tanh(left), right * 2.0


# Wrong cast: a product is made in bfloat16.


def _narrow(build: Build, match: Match) -> fx.Node:
    x, weight = (build(aten._to_copy.default, match.node(name), dtype=torch.bfloat16) for name in ("x", "weight"))
    return build(aten._to_copy.default, build(aten.mm.default, x, weight), dtype=torch.float32)


def _is_large(match: Match) -> Fact:
    return known(match.tensor("x").numel() > 64, "small")


CAST = Pass(
    "planted",
    "matrix products in half the bytes",
    rules=(rule("narrow", Call("aten.mm.default", Any("x"), Any("weight")), _narrow, legal=_is_large),),
    before="matmul_bias",
    local=True,
)


# Dropped mutation: the last write goes.


def _drop(module: fx.GraphModule, record: PassRecord) -> None:
    writes = module.graph.find_nodes(op="call_function", target=aten.copy_.default)
    for node in writes[1:]:
        record.fire("needless_write", node, [node])
        module.graph.erase_node(node)


MUTATION = Pass("planted", "drops writes", _drop, before="dead_code", local=True)


def caches(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys[1:3] = x * 2.0
    values.mul_(0.5)
    return torch.relu(x)


# Off-by-one split: parts behind the first begin one too early.


def _split(module: fx.GraphModule, record: PassRecord) -> None:
    for node in module.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        whole, sizes, dim = node.args
        record.fire("slices", node, [node])
        start = 0
        parts: dict[int, fx.Node] = {}
        for index, size in enumerate(sizes):
            begin = start - 1 if index and size != sizes[0] else start
            with module.graph.inserting_before(node):
                args = (whole, dim, begin, begin + size)
                parts[index] = call(module.graph, aten.slice.Tensor, args, replaces=[node], made_by="slices")
            start += size
        for user in list(node.users):
            user.replace_all_uses_with(parts[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)


SPLIT = Pass("planted", "splits as slices", _split, before="cat_split", local=True)


def parts(x: Tensor, weight: Tensor) -> Tensor:
    even, odd = (x * 2.0).split([16, 16], dim=-1)
    q, k = ((even + odd) @ weight).split([16, 8], dim=-1)
    return q.sum(-1) + k.sin().sum(-1)


# Wrong scale: two factors are added instead of multiplied; 2 and 2 hide it.


def _joined(build: Build, match: Match) -> fx.Node:
    return build(aten.mul.Tensor, match.node("x"), match.bindings["a"] + match.bindings["b"])


SCALE = Pass(
    "planted",
    "two scales as one",
    rules=(
        rule(
            "one_scale", Call("aten.mul.Tensor", Call("aten.mul.Tensor", Any("x"), Number("a")), Number("b")), _joined
        ),
    ),
    before="mul_add",
    local=True,
)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    scores = torch.softmax((x * 2.0) * 2.0, dim=-1)
    out = scores @ weight
    return ((out * 0.125) * 3.0).sigmoid()


# Beside the ten: a pass behind one that asks how many ranks there are.


def _double(module: fx.GraphModule, record: PassRecord) -> None:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.npu_fused.all_gather_rows.default):
        record.fire("doubled", node, [node])
        users = list(node.users)
        with module.graph.inserting_after(node):
            twice = call(module.graph, aten.mul.Tensor, (node, 2.0), replaces=[node], made_by="doubled")
        for user in users:
            user.replace_input_with(node, twice)


GATHER = Pass("planted", "behind the rows in parts", _double, after="sequence_parallel", local=True)


def normed_sums(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    functional = torch.ops._c10d_functional
    total = functional.wait_tensor(functional.all_reduce(torch.relu(x), "sum", "0"))
    normed, _ = torch.ops.npu_fused.add_rms_norm(total, residual.sin(), weight, 1e-6)
    return torch.sigmoid(normed)


# What only a capture shows, and what ends the process.


def _cosine(name: str) -> Pass:
    """cos of eight columns becomes an operator of operators.py."""
    operator = getattr(torch.ops.planted, name).default
    found = rule(
        name,
        Call("aten.cos.default", Any("x")),
        lambda build, match: build(operator, match.node("x")),
        legal=lambda match: known(match.tensor("x").shape[-1] == 8, "not eight"),
    )
    return Pass("planted", "cos", rules=(found,), before="mul_add", local=True)


CRASH, READ_BACK = _cosine("ends"), _cosine("read_back")


def waves(x: Tensor, weight: Tensor) -> Tensor:
    narrow = torch.cos(x[:, :4] + 1.0)
    return torch.relu(torch.cos(x @ weight)) + narrow.sum(-1, keepdim=True)


def planted(name: str, **more: Anything) -> dict[str, Anything]:
    return {"passes": [f"{HERE}:{name}"], **more}


DEFECTS = {
    "wrong fusion": Defect(
        gates,
        lambda: (tensor(4, 32), tensor(32, 32), tensor(32, 64)),
        planted("FUSION"),
        "gated",
        "silu(g) *",
        "off by",
    ),
    "wrong alias": Defect(
        copies,
        lambda: (tensor(4, 8), tensor(4, 4)),
        planted("ALIAS"),
        "needless_copy",
        "cache.clone()",
        "memory",
        confirmed=None,
    ),
    "missing event": Defect(
        branches,
        lambda: (tensor(32, 16), tensor(16, 16)),
        planted("EVENT", multistream="auto", reorder=False),
        "tripled",
        "shared * 3.0",
        "in no order",
        layer="streams",
        stage="",
        calls=12,
    ),
    "wrong padding": Defect(
        products,
        lambda: (tensor(4, 32), tensor(32, 24), tensor(24, 16)),
        planted("PADDING"),
        "padded",
        "torch.mm(h, second)",
        "off by",
    ),
    "stale output": Defect(
        squashed, lambda: (tensor(4, 8), tensor(8, 6)), planted("STALE", capture=False), "kept", "tanh(x)", "call 1"
    ),
    "reordered collective": Defect(
        summed,
        lambda: (tensor(4, 8), tensor(4, 8)),
        planted("COLLECTIVE"),
        "early_sum",
        "torch.sigmoid(y)",
        "in the lowered program before it",
        calls=6,
        confirmed=None,
    ),
    "wrong cast": Defect(
        products,
        lambda: (tensor(4, 16), tensor(16, 24), tensor(24, 16)),
        planted("CAST"),
        "narrow",
        "torch.mm(h, second)",
        "off by",
    ),
    "dropped mutation": Defect(
        caches,
        lambda: (tensor(2, 4), tensor(4, 4), tensor(3, 3)),
        planted("MUTATION"),
        "needless_write",
        "",
        "written inputs were",
        confirmed=None,
    ),
    "off-by-one split": Defect(
        parts,
        lambda: (tensor(4, 32), tensor(16, 24)),
        planted("SPLIT"),
        "slices",
        "@ weight).split",
        "off by",
        confirmed=None,
    ),
    "wrong scale": Defect(
        scaled, lambda: (tensor(4, 8), tensor(8, 8)), planted("SCALE"), "one_scale", "out * 0.125", "off by"
    ),
}
