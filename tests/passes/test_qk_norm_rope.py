"""qk_norm_rope: Hugging Face's and vLLM's programs, and what is left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_compiler.backend import AscendBackend
from npu_compiler.config import Options
from npu_compiler.passes import pipeline, qk_norm_rope
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(qk_norm_rope.NAME, "", qk_norm_rope.run)
HEADS, KV_HEADS, SIZE = 4, 2, 16


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def hugging_face(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """x [B, T, (HEADS + KV_HEADS) * SIZE]; cos, sin [B, T, SIZE]; as in transformers' Qwen3Attention."""
    q, k = x.split([HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
    q, k = q.unflatten(-1, (HEADS, SIZE)), k.unflatten(-1, (KV_HEADS, SIZE))
    if q_weight is not None and k_weight is not None:
        q, k = norm(q, q_weight), norm(k, k_weight)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def vllm(x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """x [T, (HEADS + KV_HEADS) * SIZE]; cos, sin [T, SIZE / 2]; as in vLLM's ApplyRotaryEmb.forward_static."""

    def rotate(part: Tensor) -> Tensor:
        part = part.view(part.shape[0], -1, SIZE)
        c, s = cos.unsqueeze(-2).to(part.dtype), sin.unsqueeze(-2).to(part.dtype)
        first, second = torch.chunk(part, 2, dim=-1)
        turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        return torch.cat((turned, part[..., SIZE:]), dim=-1).reshape(part.shape[0], -1)

    q, k = x.split([HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
    if q_weight is not None and k_weight is not None:
        q = norm(q.view(q.shape[0], -1, SIZE), q_weight).view(q.shape)
        k = norm(k.view(k.shape[0], -1, SIZE), k_weight).view(k.shape)
    return rotate(q), rotate(k)


def arguments(form: Callable[..., object], normed: bool, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    batch = (2, 5) if form is hugging_face else (5,)
    width = SIZE if form is hugging_face else SIZE // 2
    x = torch.randn(*batch, (HEADS + KV_HEADS) * SIZE, dtype=dtype)
    weights = [torch.randn(SIZE, dtype=dtype) if normed else None for _ in range(2)]
    angle = torch.randn(*batch, SIZE // 2)
    angle = torch.cat((angle, angle), dim=-1)[..., :width]
    return x, *weights, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("form", [hugging_face, vllm])
def test_pair_becomes_one_operator(form: Callable[..., tuple[Tensor, ...]], normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = arguments(form, normed, dtype)
    program = lowered(form, *args)
    tensors = [arg for arg in args if arg is not None]
    records = pipeline.run(program.graph, Options())
    fused = "npu_fused.qk_norm_rope.default" if normed else "npu_fused.qk_rope.default"
    operators = calls(program.graph)
    assert operators.count(fused) == 1
    assert not {"aten.rsqrt.default", "aten.neg.default", "aten.sub.Tensor", "aten.mul.Tensor"} & set(operators)
    (record,) = [record for record in records if record.name == qk_norm_rope.NAME]
    assert [fired.rule for fired in record.fired] == [fused.split(".")[1]]
    expected = form(*(arg if arg is None else arg.double() for arg in args))
    for got, want in zip(program.graph(*tensors), expected, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05, check_dtype=False
        )


def test_dynamic_token_count() -> None:
    args = arguments(hugging_face, True, torch.float32)
    for arg in (args[0], *args[3:]):
        assert arg is not None
        torch._dynamo.mark_dynamic(arg, 1)
    program = lowered(hugging_face, *args, dynamic=None)
    record = apply(PASS, program.graph)
    assert [fired.rule for fired in record.fired] == ["qk_norm_rope"]


def test_layers_are_paired_each_on_its_own() -> None:
    """All layers share cos and sin, and the second layer's q depends on the first one's k."""

    def two_layers(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = hugging_face(x, None, None, cos, sin)
        y = torch.cat((q, k), dim=1).transpose(1, 2).flatten(2)
        return hugging_face(y, None, None, cos, sin)

    x, _, _, cos, sin = arguments(hugging_face, False, torch.float32)
    assert x is not None
    assert cos is not None
    assert sin is not None
    program = lowered(two_layers, x, cos, sin)
    pipeline.run(program.graph, Options())
    assert calls(program.graph).count("npu_fused.qk_rope.default") == 2
    for got, want in zip(program.graph(x, cos, sin), two_layers(x, cos, sin), strict=True):
        torch.testing.assert_close(got, want)


def left_out(function: Callable[..., object], *args: Tensor) -> tuple[list[str], PassRecord]:
    program = lowered(function, *args)
    record = apply(PASS, program.graph)
    return [refused.reason for refused in record.refused], record


def test_one_rotated_tensor_stays() -> None:
    reasons, record = left_out(
        lambda x, cos, sin: x * cos + turn(x) * sin, torch.randn(5, 4, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    )
    assert not record.fired
    assert reasons == ["no second tensor is rotated by the same cos and sin"]


def test_chain_of_two_rotations_is_no_pair() -> None:
    def chain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = x * cos + turn(x) * sin
        return y * cos + turn(y) * sin

    reasons, record = left_out(chain, torch.randn(5, 4, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16))
    assert not record.fired
    assert "no independent tensor is rotated by the same cos and sin" in reasons


def test_heads_before_tokens_in_memory_stays() -> None:
    def straight(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    reasons, record = left_out(
        straight, torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16), torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 16)
    )
    assert not record.fired
    assert any("heads come before tokens in memory" in reason for reason in reasons)


def test_mixed_dtypes_stay() -> None:
    reasons, record = left_out(
        lambda x, cos, sin: x * cos + turn(x) * sin,
        torch.randn(5, 4, 16, dtype=torch.bfloat16),
        torch.randn(5, 1, 16),
        torch.randn(5, 1, 16),
    )
    assert not record.fired
    assert any("are mixed" in reason for reason in reasons)


def test_vllms_own_program() -> None:
    """vLLM's operators and its rotary embedding, with any number of tokens."""
    pytest.importorskip("vllm.ir.ops")
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    def attention(
        x: Tensor, positions: Tensor, q_weight: Tensor, k_weight: Tensor, cache: Tensor
    ) -> tuple[Tensor, ...]:
        q, k = x.split([HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
        normed = []
        for part, weight in ((q, q_weight), (k, k_weight)):
            heads = part.view(*part.shape[:-1], part.shape[-1] // SIZE, SIZE)
            normed.append(torch.ops.vllm_ir.rms_norm(heads, weight, 1e-6, None).view(part.shape))
        return RotaryEmbedding.forward_static(positions, *normed, SIZE, SIZE, cache, True)

    torch.manual_seed(0)
    weights_and_cache = torch.rand(SIZE), torch.rand(SIZE), torch.randn(64, SIZE)
    backend = AscendBackend()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(attention, backend=backend, fullgraph=True)
        for tokens in (5, 7):
            x, positions = torch.randn(tokens, (HEADS + KV_HEADS) * SIZE), torch.arange(tokens)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(positions, 0)
            args = (x, positions, *weights_and_cache)
            for got, want in zip(run(*args), attention(*args), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    (compiled,) = backend.compiled()
    assert compiled.graph is not None
    # heads of 16 elements: the norms stay on their own, and the rotation gathers cos and sin itself
    operators = [name for name in calls(compiled.graph) if name.startswith("npu_fused") or "split" not in name]
    assert operators.count("npu_fused.rms_norm.default") == 2
    assert operators.count("npu_fused.qk_rope_cached.default") == 1
    assert not {"vllm_ir.rms_norm.default", "aten.mul.Tensor", "aten.index_select.default"} & set(operators)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("width", [SIZE, SIZE // 2])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
def test_rows_of_a_table(neox: bool, width: int, tokens: int) -> None:
    """vLLM's rotary embedding of halves and of neighbours, of the whole head and of its first part."""
    pytest.importorskip("vllm.ir.ops")
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    def attention(x: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        q, k = x.split([HEADS * SIZE, KV_HEADS * SIZE], dim=-1)
        return RotaryEmbedding.forward_static(positions, q, k, SIZE, width, cache, neox)

    torch.manual_seed(0)
    args = torch.randn(tokens, (HEADS + KV_HEADS) * SIZE), torch.randint(64, (tokens,)), torch.randn(64, width)
    program = lowered(attention, *args)
    records = pipeline.run(program.graph, Options(check=True))
    (record,) = [record for record in records if record.name == qk_norm_rope.NAME]
    assert [entry.rule for entry in record.fired] == ["qk_rope_cached"], str(record)
    assert "aten.cat.default" not in calls(program.graph)
    for got, want in zip(program.graph(*args), attention(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _turned_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def test_neighbours_without_a_table_stay() -> None:
    reasons, record = left_out(
        lambda q, k, cos, sin: (_turned_neighbours(q, cos, sin), _turned_neighbours(k, cos, sin)),
        *(torch.randn(5, heads, 16) for heads in (4, 2)),
        *(torch.randn(5, 1, 8) for _ in range(2)),
    )
    assert not record.fired
    assert reasons == ["neighbours are rotated by cos and sin that are not rows of a table"] * 2


def test_the_second_part_of_a_head_is_no_rest() -> None:
    """cat((rotated, other)), where other is not what follows in the head: the rotation alone is replaced."""

    def program(table: Tensor, positions: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (part.unsqueeze(-2) for part in table.index_select(0, positions).chunk(2, dim=-1))
        out = []
        for part in (x[:, :4], x[:, 4:]):
            first, second = part[..., :8].chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            out.append(torch.cat((turned, part[..., 4:12]), dim=-1))
        return tuple(out)

    args = torch.randn(32, 8), torch.arange(5), torch.randn(5, 6, 16)
    graph = lowered(program, *args).graph
    record = apply(PASS, graph)
    assert [entry.rule for entry in record.fired] == ["qk_rope_cached"]
    assert calls(graph).count("aten.cat.default") == 2
    for got, want in zip(graph(*args), program(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _parted(x: Tensor, cos: Tensor, sin: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """The first part of each head rotated; x [B, T, HEADS * 3 * SIZE] of q, k, v: head by head (GPT-NeoX) or each in
    one piece (Phi); cos, sin [B, T, SIZE / 2]."""
    if packed:
        q, k, _ = x.unflatten(-1, (HEADS, 3 * SIZE)).transpose(1, 2).chunk(3, dim=-1)
    else:
        q, k, _ = (part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in x.chunk(3, dim=-1))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = []
    for part in (q, k):
        first, rest = part[..., : cos.shape[-1]], part[..., cos.shape[-1] :]
        out.append(torch.cat((first * cos + turn(first) * sin, rest), dim=-1))
    return out[0], out[1]


@pytest.mark.parametrize("tokens", [1, 5, None], ids=["one", "static", "dynamic"])
@pytest.mark.parametrize("packed", [True, False], ids=["gpt_neox", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_part_of_a_head_with_heads_before_tokens(dtype: torch.dtype, packed: bool, tokens: int | None) -> None:
    torch.manual_seed(0)
    count = tokens or 5
    angle = torch.randn(2, count, SIZE // 4).repeat(1, 1, 2)
    args = (torch.randn(2, count, HEADS * 3 * SIZE, dtype=dtype), angle.cos().to(dtype), angle.sin().to(dtype))
    if tokens is None:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 1)
    backend = AscendBackend()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(functools.partial(_parted, packed=packed), backend=backend, fullgraph=True)
        outputs = run(*args)
        expected = _parted(*(arg.double() for arg in args), packed)
    for got, want in zip(outputs, expected, strict=True):
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    (compiled,) = backend.compiled()
    assert compiled.graph is not None
    operators = calls(compiled.graph)
    assert operators.count("npu_fused.qk_rope.default") == 1
    assert not {"aten.neg.default", "aten.mul.Tensor", "aten.add.Tensor"} & set(operators)


def _widened(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, table_widened: bool) -> tuple[Tensor, Tensor]:
    """q and k [B, N, T, D], rotated in float32 (ModernBERT, Qwen2-VL)."""
    wide = q.float(), k.float()
    if table_widened:
        cos, sin = cos.float(), sin.float()
    q_out, k_out = (x * cos + turn(x) * sin for x in wide)
    return q_out.to(q.dtype), k_out.to(k.dtype)


def _widened_arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k = (torch.randn(2, 5, 4, SIZE, dtype=dtype).transpose(1, 2) for _ in range(2))
    angle = torch.randn(2, 1, 5, SIZE // 2).repeat(1, 1, 1, 2)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("table_widened", [True, False])
def test_a_rotation_in_float32_of_bfloat16_is_one_of_bfloat16(table_widened: bool) -> None:
    torch.manual_seed(0)
    program = functools.partial(_widened, table_widened=table_widened)
    args = _widened_arguments(torch.bfloat16)
    graph = lowered(program, *args).graph
    records = pipeline.run(graph, Options(check=True))
    (record,) = [record for record in records if record.name == qk_norm_rope.NAME]
    assert [entry.rule for entry in record.fired] == ["qk_rope"], str(record)
    assert "aten._to_copy.default" not in calls(graph)
    for got, want in zip(graph(*args), program(*args), strict=True):
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


def test_a_rotation_in_float32_of_float16_stays() -> None:
    """The kernel would compute it in float16."""
    reasons, record = left_out(functools.partial(_widened, table_widened=False), *_widened_arguments(torch.float16))
    assert not record.fired
    assert "dtypes torch.float32, torch.float16, torch.float16 are mixed" in reasons


def test_a_rotation_that_is_read_in_float32_stays() -> None:
    def program(*args: Tensor) -> tuple[Tensor, ...]:
        q, k, cos, sin = args[0].float(), args[1].float(), *args[2:]
        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    reasons, record = left_out(program, *_widened_arguments(torch.bfloat16))
    assert not record.fired
    assert "dtypes torch.float32, torch.bfloat16, torch.bfloat16 are mixed" in reasons
