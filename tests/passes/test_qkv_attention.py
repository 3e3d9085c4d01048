"""qkv_attention on the graphs of upstream vLLM's models: where it fires, and why not elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from vllm.utils.torch_utils import _encode_layer_name

from npu_compiler.fusion_kernels import registry
from npu_compiler.passes import qkv_attention
from npu_compiler.passes.record import Pass
from npu_compiler.serving import qkv_attention as qkv_attention_operator
from tests.passes import vllm_graphs
from tests.passes.conditions import conditions, unexplained
from tests.passes.lowered import apply, lowered
from tests.passes.vllm_graphs import ATTENTION, PACKED_ATTENTION, Shape, fired, layer

LEFT_OUT = [
    (Shape("qwen3", dtype="float32"), "the kernel takes float16 or bfloat16, not torch.float32"),
    (Shape("qwen3", changes=(("head_dim", 64),)), "head size of the kernel: 64 is not 128"),
    (Shape("llama"), "query and key are not normalised and rotated by one operator"),
]


def name(value: object) -> str:
    return f"{value.family}-{value.dtype}" if isinstance(value, Shape) else ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_qwen3_layer(dtype: str) -> None:
    compiled = vllm_graphs.graph(Shape("qwen3", dtype=dtype)).compiled({"check": True})
    assert compiled.graph is not None
    assert fired(compiled)[qkv_attention.NAME] == vllm_graphs.SMALL["num_hidden_layers"]
    operators = layer(compiled.graph)
    operators.remove("aten.empty.memory_format")  # the attention's output: memory, no kernel
    # the last stands for two kernels: from the projection to the cache, and the attention
    assert len(operators) == 8
    assert operators[-2:] == ["aten.matmul.default", PACKED_ATTENTION]
    assert ATTENTION not in operators


def test_source_line_and_saving() -> None:
    compiled = vllm_graphs.graph(Shape("qwen3")).compiled()
    (record,) = [record for record in compiled.records if record.name == qkv_attention.NAME]
    for entry in record.fired:
        assert "unified_attention_with_output" in entry.place
        assert entry.saves is not None
        assert entry.saves.kernels == 1
    assert compiled.graph is not None
    for node in compiled.graph.graph.nodes:
        if str(node.target) == PACKED_ATTENTION:
            assert "attention.py" in node.meta["stack_trace"]


@pytest.mark.parametrize(("shape", "reason"), LEFT_OUT, ids=name)
def test_left_out_with_the_reason(shape: Shape, reason: str) -> None:
    compiled = vllm_graphs.graph(shape).compiled()
    (record,) = [record for record in compiled.records if record.name == qkv_attention.NAME]
    assert not record.fired
    assert [entry.reason for entry in record.refused] == [reason] * vllm_graphs.SMALL["num_hidden_layers"]
    assert compiled.graph is not None
    assert layer(compiled.graph)[-1] == ATTENTION


def test_can_be_switched_off() -> None:
    compiled = vllm_graphs.graph(Shape("qwen3")).compiled({"disabled_passes": [qkv_attention.NAME]})
    assert compiled.graph is not None
    assert layer(compiled.graph)[-2:] == ["aten.empty.memory_format", ATTENTION]


TOKENS, QUERY, KV, SIZE = 5, 4, 2, 128


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    """Those that the programs below call."""
    registry.register()
    qkv_attention_operator.register()


@dataclasses.dataclass(frozen=True)
class Block:
    """What vLLM's attention and what is in front of it give, with what may differ.

    Attributes:
        parts: query, key and value before the norm, of the projection and an input of one part.
        query, key, value: the shapes that the attention gets.
        scaled: whether the attention quantises its output.
    """

    epsilon: float = 1e-6
    fused: bool = True
    parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = lambda qkv, other: qkv.split(
        [QUERY * SIZE, KV * SIZE, KV * SIZE], dim=-1
    )
    heads: tuple[tuple[int, ...], ...] = ((TOKENS, QUERY, SIZE), (TOKENS, KV, SIZE), (TOKENS, KV, SIZE))
    attended: tuple[tuple[int, ...], ...] = ((TOKENS, QUERY, SIZE), (TOKENS, KV, SIZE), (TOKENS, KV, SIZE))
    scaled: bool = False

    def __call__(self, qkv: Tensor, other: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part.reshape(shape) for part, shape in zip(self.parts(qkv, other), self.heads, strict=True))
        if self.fused:
            q, k = torch.ops.npu_fused.qk_norm_rope(q, k, weight, weight, 1e-6, self.epsilon, cos, sin)
        q, k, v = (part.view(shape) for part, shape in zip((q, k, v), self.attended, strict=True))
        out = torch.empty_like(q)
        scale = weight[:1] if self.scaled else None
        torch.ops.vllm.unified_attention_with_output(q, k, v, out, _encode_layer_name("layer"), scale)
        return out


def arguments(**changed: Tensor) -> dict[str, Tensor]:
    half = torch.bfloat16
    given = {
        "qkv": torch.ones(TOKENS, (QUERY + 2 * KV) * SIZE, dtype=half),
        "other": torch.ones(TOKENS, KV * SIZE, dtype=half),
        "weight": torch.ones(SIZE, dtype=half),
        "cos": torch.ones(TOKENS, 1, SIZE, dtype=half),
        "sin": torch.ones(TOKENS, 1, SIZE, dtype=half),
    }
    return given | changed


def halved(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def apart(qkv: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """The value is no part of the projection."""
    q, k, _ = qkv.split([QUERY * SIZE, KV * SIZE, KV * SIZE], dim=-1)
    return q, k, other


def no_split(qkv: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return torch.cat((other, other), dim=-1), other + 1, other


SMALLER = ((TOKENS, 2 * QUERY, 64), (TOKENS, 2 * KV, 64), (TOKENS, 2 * KV, 64))
FOUR, THREE = (1, TOKENS, QUERY, SIZE), (TOKENS, QUERY, SIZE)
KEY, KEY_OF_FOUR = (TOKENS, KV, SIZE), (1, TOKENS, KV, SIZE)
MISSES: list[tuple[Block, dict[str, Tensor], str]] = [
    (Block(), {name: item.float() for name, item in arguments().items()}, "takes float16 or bfloat16, not torch.float"),
    (Block(heads=SMALLER, attended=SMALLER), {}, "head size of the kernel: 64 is not 128"),
    (Block(fused=False), {}, "query and key are not normalised and rotated by one operator"),
    (Block(parts=no_split), {}, "query is no part of a split projection"),
    (Block(parts=apart), {}, "query, key and value are not the three parts of one projection"),
    (Block(), {"cos": torch.ones(TOKENS, 1, SIZE)}, "the dtypes ['torch.bfloat16', 'torch.float32'] differ"),
    (Block(), {"qkv": halved(1, TOKENS, (QUERY + 2 * KV) * SIZE)}, "the projection is not [tokens, columns]"),
    (Block(epsilon=1e-5), {}, "the norms' epsilons 1e-06 and 1e-05 differ"),
    (Block(), {"cos": halved(TOKENS, 1, 64)}, "rotated part of the head: 64 is not 128"),
    (Block(), {"cos": halved(TOKENS, SIZE)}, "cos has 2 dimensions"),
    (Block(), {"cos": halved(1, 1, SIZE)}, "cos along the tokens: 1 is not 5"),
    (Block(heads=(FOUR, KEY, KEY)), {}, "heads of the query: 3 and 4 dimensions"),
    (Block(heads=(THREE, KEY_OF_FOUR, KEY)), {}, "heads of the key: 3 and 4 dimensions"),
    (Block(attended=(THREE, KEY, (TOKENS, 1, KV * SIZE))), {}, "heads of key and value, dimension 1: 2 is not 1"),
    (Block(scaled=True), {}, "the attention quantises its output or follows a cache write of its own"),
]


def refused(block: Block, changed: dict[str, Tensor]) -> list[str]:
    program = lowered(block, *arguments(**changed).values()).graph
    record = apply(Pass(qkv_attention.NAME, "", qkv_attention.run), program)
    assert not record.fired
    return [entry.reason for entry in record.refused]


@pytest.mark.parametrize(("block", "changed", "reason"), MISSES, ids=[reason for *_, reason in MISSES])
def test_near_miss(block: Block, changed: dict[str, Tensor], reason: str) -> None:
    (given,) = refused(block, changed)
    assert reason in given


def test_what_the_near_misses_differ_from() -> None:
    program = lowered(Block(), *arguments().values()).graph
    record = apply(Pass(qkv_attention.NAME, "", qkv_attention.run), program)
    assert [entry.rule for entry in record.fired] == [qkv_attention.NAME]


def test_every_condition_has_a_near_miss() -> None:
    given = [reason for block, changed, _ in MISSES for reason in refused(block, changed)]
    asked = [one for one in conditions(qkv_attention.run) if one.where.startswith(f"{qkv_attention.__name__}:")]
    assert len(asked) == len(MISSES)
    open_ = unexplained(asked, given)
    assert not open_, open_
