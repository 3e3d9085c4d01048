"""RMSNorm, gated activations and rotary embeddings against float64 references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (5, 128), (3, 2, 17), (2, 0, 16), (4, 1000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    gamma = torch.randn(shape[-1]).to(dtype)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)
    expected, expected_rstd = reference.rms_norm(x, gamma, 1e-5)
    assert y.dtype == dtype and rstd.dtype == torch.float32
    reference.assert_close(y, expected, dtype)
    reference.assert_close(rstd, expected_rstd, torch.float32)


def test_rms_norm_over_two_dimensions_of_a_view() -> None:
    packed = torch.randn(6, 3, 2, 8)
    gamma = torch.randn(2, 8)
    y, rstd = torch_npu.npu_rms_norm(packed.npu()[:, 1], gamma.npu(), 1e-6)
    expected, expected_rstd = reference.rms_norm(packed[:, 1], gamma, 1e-6)
    reference.assert_close(y, expected, torch.float32)
    reference.assert_close(rstd, expected_rstd, torch.float32)


def test_rms_norm_reads_heads_of_a_packed_projection() -> None:
    """QK-norm: rows of 16 in a [tokens, 80] projection."""
    packed = torch.randn(7, 80)
    gamma = torch.randn(16)
    heads = packed.npu().split([48, 16, 16], dim=-1)[0].view(7, 3, 16)
    y, _ = torch_npu.npu_rms_norm(heads, gamma.npu(), 1e-6)
    expected, _ = reference.rms_norm(packed[:, :48].reshape(7, 3, 16), gamma, 1e-6)
    reference.assert_close(y, expected, torch.float32)


def test_rms_norm_of_a_transposed_tensor() -> None:
    x = torch.randn(24, 6)
    gamma = torch.randn(24)
    y, _ = torch_npu.npu_rms_norm(x.npu().t(), gamma.npu(), 1e-6)
    expected, _ = reference.rms_norm(x.t(), gamma, 1e-6)
    reference.assert_close(y, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x1, x2 = (torch.randn(5, 72).to(dtype) for _ in range(2))
    gamma = torch.randn(72).to(dtype)
    y, rstd, total = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu(), 1e-6)
    assert torch.equal(total.cpu(), x1 + x2), "the sum is rounded as the type's own addition"
    expected, expected_rstd = reference.rms_norm(x1 + x2, gamma, 1e-6)
    reference.assert_close(y, expected, dtype, factor=2)
    reference.assert_close(rstd, expected_rstd, torch.float32)


def test_add_rms_norm_in_place() -> None:
    x1, x2, gamma = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    normed, total = x1.npu(), x2.npu()
    torch_npu.npu_add_rms_norm_v2(normed, total, gamma.npu(), 1e-6)
    assert torch.equal(total.cpu(), x1 + x2)
    reference.assert_close(normed, reference.rms_norm(x1 + x2, gamma, 1e-6)[0], torch.float32)


def test_add_rms_norm_cast_gives_both_precisions() -> None:
    x1, x2 = (torch.randn(3, 40).bfloat16() for _ in range(2))
    gamma = torch.randn(40).bfloat16()
    wide, narrow, _, total = torch_npu.npu_add_rms_norm_cast(x1.npu(), x2.npu(), gamma.npu(), 1e-6)
    assert wide.dtype == torch.float32 and torch.equal(wide.cpu(), narrow.cpu().float())
    assert torch.equal(total.cpu(), x1 + x2)


def test_gemma_rms_norm_adds_one_to_gamma() -> None:
    x, gamma = torch.randn(4, 33), torch.randn(33)
    y, _ = torch_npu.npu_gemma_rms_norm(x.npu(), gamma.npu(), 1e-6)
    reference.assert_close(y, reference.rms_norm(x, gamma + 1, 1e-6)[0], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), [((3, 64), -1), ((2, 10, 3), 1), ((1, 2 * 37), 1), ((6, 4), 0)])
def test_swiglu(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(4).to(dtype)
    gate, linear = x.double().chunk(2, dim=dim)
    actual = torch_npu.npu_swiglu(x.npu(), dim=dim)
    assert actual.dtype == dtype
    reference.assert_close(actual, torch.nn.functional.silu(gate) * linear, dtype)


def test_swiglu_keeps_extreme_values_finite() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 5.0]])
    assert torch_npu.npu_swiglu(x.npu()).cpu().tolist() == [[0.0, 600.0, 0.0]]


@pytest.mark.parametrize("approximate", [0, 1])
@pytest.mark.parametrize("left", [True, False])
def test_geglu(approximate: int, left: bool) -> None:
    x = torch.randn(3, 34) * 3
    halves = x.double().chunk(2, dim=-1)
    gate, linear = halves if left else halves[::-1]
    expected_gate = torch.nn.functional.gelu(gate, approximate="tanh" if approximate else "none")
    y, gate_out = torch_npu.npu_geglu(x.npu(), -1, approximate, left)
    reference.assert_close(y, expected_gate * linear, torch.float32)
    reference.assert_close(gate_out, expected_gate, torch.float32)


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, width] as models make them: the two halves are equal."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(tokens).float() * 3 + 1, frequencies).repeat(1, 2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_rotary_mul_half(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 5, 3, width).to(dtype)
    cos, sin = (t.to(dtype)[None, :, None] for t in angles(5, width))
    expected = x.double() * cos.double() + reference.rotate_half(x.double()) * sin.double()
    reference.assert_close(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu()), expected, dtype)


@pytest.mark.parametrize("layout", ["BNSD", "SBND"])
def test_rotary_mul_broadcasts_over_heads_and_batches(layout: str) -> None:
    cos, sin = angles(5, 32)
    if layout == "BNSD":
        x, cos, sin = torch.randn(2, 3, 5, 32), cos[None, None], sin[None, None]
    else:
        x, cos, sin = torch.randn(5, 2, 3, 32), cos[:, None, None], sin[:, None, None]
    expected = x.double() * cos + reference.rotate_half(x.double()) * sin
    reference.assert_close(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu()), expected, torch.float32)


def test_rotary_mul_interleave() -> None:
    x, (cos, sin) = torch.randn(1, 4, 2, 12), angles(4, 12)
    cos, sin = cos[None, :, None], sin[None, :, None]
    expected = x.double() * cos + reference.rotate_pairs(x.double()) * sin
    actual = torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "interleave")
    reference.assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_apply_rotary_pos_emb_writes_in_place(mode: str) -> None:
    query, key = torch.randn(6, 4, 128), torch.randn(6, 2, 128)
    cos, sin = (t[:, None] for t in angles(6, 128))
    rotate = reference.rotate_half if mode == "half" else reference.rotate_pairs
    expected = [x.double() * cos + rotate(x.double()) * sin for x in (query, key)]
    query_npu, key_npu = query.npu(), key.npu()
    torch_npu.npu_apply_rotary_pos_emb(query_npu, key_npu, cos.npu(), sin.npu(), layout="TND", rotary_mode=mode)
    reference.assert_close(query_npu, expected[0], torch.float32)
    reference.assert_close(key_npu, expected[1], torch.float32)


def test_apply_rotary_pos_emb_takes_heads_of_128_only() -> None:
    x, (cos, sin) = torch.randn(3, 2, 64).npu(), (t[:, None].npu() for t in angles(3, 64))
    with pytest.raises(RuntimeError, match="last dimension of 128"):
        torch_npu.npu_apply_rotary_pos_emb(x, x.clone(), cos, sin, layout="TND")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_width", [32, 16])
def test_rope_from_a_cache(rotary_width: int, neox: bool, dtype: torch.dtype) -> None:
    """npu_mrope with one row of positions: vLLM's rotary embedding, partial widths included."""
    positions = torch.tensor([3, 0, 7, 7])
    angle = torch.outer(torch.arange(9).float(), 1.0 / 100 ** (torch.arange(rotary_width // 2) / 8))
    cache = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
    query, key = torch.randn(4, 3 * 32).to(dtype), torch.randn(4, 32).to(dtype)
    cos, sin = cache.double()[positions].chunk(2, dim=-1)
    expected = []
    for x in (query, key):
        heads = x.double().view(4, -1, 32)
        rotated, rest = heads[..., :rotary_width], heads[..., rotary_width:]
        spread = (lambda t: t.repeat(1, 2)) if neox else (lambda t: t.repeat_interleave(2, dim=-1))
        rotate = reference.rotate_half if neox else reference.rotate_pairs
        rotated = rotated * spread(cos)[:, None] + rotate(rotated) * spread(sin)[:, None]
        expected.append(torch.cat((rotated, rest), dim=-1).flatten(1))
    actual = torch_npu.npu_mrope(
        positions.npu(), query.npu(), key.npu(), cache.npu(), 32, rotary_mode="half" if neox else "interleave"
    )
    for got, want in zip(actual, expected, strict=True):
        reference.assert_close(got, want, dtype)


def test_norms_in_a_graph_replay_with_new_values() -> None:
    x, residual, gamma = torch.randn(2, 64).npu(), torch.randn(2, 64).npu(), torch.randn(64).npu()
    torch_npu.npu_add_rms_norm(x, residual, gamma)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y, _, total = torch_npu.npu_add_rms_norm(x, residual, gamma, 1e-6)
        gated = torch_npu.npu_swiglu(y)
    for _ in range(3):
        fresh = torch.randn(2, 64)
        x.copy_(fresh)
        graph.replay()
        summed = fresh + residual.cpu()
        normed = reference.rms_norm(summed, gamma.cpu(), 1e-6)[0]
        gate, linear = normed.chunk(2, dim=-1)
        assert torch.equal(total.cpu(), summed)
        reference.assert_close(gated, torch.nn.functional.silu(gate) * linear, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch_npu.npu_rms_norm(torch.zeros(2, 8).npu(), torch.zeros(4).npu()), "gamma"),
        (lambda: torch_npu.npu_rms_norm(torch.zeros(2, 8).npu().half(), torch.zeros(8).npu().bfloat16()), "gamma"),
        (lambda: torch_npu.npu_swiglu(torch.zeros(2, 8, dtype=torch.int32).npu()), "float32, float16 or bfloat16"),
        (
            lambda: torch_npu.npu_rotary_mul(*(torch.zeros(1, 2, 3, d).npu() for d in (16, 8, 8))),
            "has to have x's shape",
        ),
    ],
)
def test_illegal_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.layer_norm(x.double(), gamma.shape, gamma.double(), beta.double(), epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (5, 100), (2, 3, 17), (2, 0, 16)])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3 + 20).to(dtype)
    gamma, beta = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    y = torch.nn.functional.layer_norm(x.npu(), gamma.shape, gamma.npu(), beta.npu(), 1e-5)
    assert y.dtype == dtype
    reference.assert_close(y, layer_norm(x, gamma, beta, 1e-5), dtype, factor=8)


def test_layer_norm_of_two_dimensions_without_weights_and_of_a_view() -> None:
    x = torch.randn(4, 6, 8)
    expected = torch.nn.functional.layer_norm(x.double(), (6, 8))
    reference.assert_close(torch.nn.functional.layer_norm(x.npu(), (6, 8)), expected, torch.float32)
    expected = torch.nn.functional.layer_norm(x.double()[:, 2:5].transpose(1, 2), (3,))
    actual = torch.nn.functional.layer_norm(x.npu()[:, 2:5].transpose(1, 2), (3,))
    reference.assert_close(actual, expected, torch.float32, factor=4)


ADD_LAYER_NORM_DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("first", "second", "weights"), ADD_LAYER_NORM_DTYPES)
def test_add_layer_norm(first: torch.dtype, second: torch.dtype, weights: torch.dtype) -> None:
    x1, x2 = torch.randn(3, 5, 72).to(first), torch.randn(3, 5, 72).to(second)
    gamma, beta = (torch.randn(72).to(weights) for _ in range(2))
    y, mean, rstd, x = torch_npu.npu_add_layer_norm(x1.npu(), x2.npu(), gamma.npu(), beta.npu(), 1e-5, True)
    result = torch.promote_types(first, second)
    assert y.dtype == x.dtype == result and mean.shape == rstd.shape == (3, 5, 1)
    total = x1.double() + x2.double()
    reference.assert_close(x, total, result)
    reference.assert_close(y, layer_norm(total, gamma, beta, 1e-5), result)
    reference.assert_close(mean, total.mean(-1, keepdim=True), torch.float32)
    reference.assert_close(rstd, torch.rsqrt(total.var(-1, correction=0, keepdim=True) + 1e-5), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x2": torch.zeros(3, 7)}, "has to have shape"),
        ({"gamma": torch.zeros(7)}, "last dimensions of x1"),
        ({"beta": torch.zeros(7)}, "has to have shape"),
        ({"gamma": torch.zeros(8).half(), "beta": torch.zeros(8).half()}, "has to be float32"),
        ({"x1": torch.zeros(3, 8).half(), "x2": torch.zeros(3, 8).bfloat16()}, "unless one of them is float32"),
    ],
)
def test_add_layer_norm_refuses(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x1": torch.zeros(3, 8), "x2": torch.zeros(3, 8), "gamma": torch.ones(8), "beta": torch.ones(8)}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_add_layer_norm(**{name: tensor.npu() for name, tensor in (arguments | change).items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_mul(approximate: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, 74) * 3).to(dtype)
    gate, linear = x.double().chunk(2, dim=-1)
    y = torch_npu.npu_gelu_mul(x.npu(), approximate=approximate)
    assert y.dtype == dtype
    reference.assert_close(y, torch.nn.functional.gelu(gate, approximate=approximate) * linear, dtype)


def test_gelu_mul_refuses_rows_that_the_document_does() -> None:
    with pytest.raises(RuntimeError, match="npu_geglu takes wider ones"):
        torch_npu.npu_gelu_mul(torch.zeros(2, 1026).npu())
