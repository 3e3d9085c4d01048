"""Mixture-of-experts operators against plain programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_top_k_softmax(dtype: torch.dtype) -> None:
    x = torch.randn(6, 10).to(dtype)
    y, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(x.npu(), None, 3)
    expected, order = x.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    reference.assert_close(y, expected[:, :3], dtype)
    assert torch.equal(experts.cpu(), order[:, :3].int())
    assert rows.cpu().tolist() == [[i, 6 + i, 12 + i] for i in range(6)]


def test_gating_marks_finished_rows() -> None:
    x = torch.randn(4, 5)
    finished = torch.tensor([False, True, False, True])
    _, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(x.npu(), finished.npu(), 2)
    assert (experts.cpu()[finished] == 5).all() and (experts.cpu()[~finished] < 5).all()


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("norm", [0, 1])
def test_gating_top_k_in_groups(norm: int, mode: int) -> None:
    x, bias = torch.randn(5, 24), torch.randn(24)
    y, experts, normed = torch_npu.npu_moe_gating_top_k(
        x.npu(), 4, bias=bias.npu(), k_group=2, group_count=4, group_select_mode=mode, norm_type=norm,
        out_flag=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    scores = x.double().softmax(-1) if norm == 0 else x.double().sigmoid()
    reference.assert_close(normed, scores, torch.float32)
    for row in range(5):
        biased = (scores[row] + bias.double()).view(4, 6)
        value = biased.amax(-1) if mode == 0 else biased.sort(-1).values[:, -2:].sum(-1)
        groups = value.sort(descending=True).indices[:2].tolist()
        allowed = sorted(((biased[g, e].item(), g * 6 + e) for g in groups for e in range(6)), reverse=True)[:4]
        chosen = [expert for _, expert in allowed]
        assert experts.cpu()[row].tolist() == chosen
        weights = scores[row][chosen]
        if norm == 1:
            weights = weights / weights.sum()
        reference.assert_close(y[row], weights * 2.5, torch.float32)


def routed(tokens: int, experts: int, k: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()


@pytest.mark.parametrize("count_type", [0, 1])
def test_init_and_finalize_routing_round_trip(count_type: int) -> None:
    tokens, experts, k = 7, 5, 2
    x, ids = torch.randn(tokens, 16), routed(7, 5, 2)
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), ids.npu(), active_num=tokens * k, expert_num=experts, expert_tokens_num_type=count_type,
        expert_tokens_num_flag=True, active_expert_range=[0, experts], quant_mode=-1, row_idx_type=0,
    )  # fmt: skip
    per_expert = torch.bincount(ids.flatten().long(), minlength=experts)
    assert torch.equal(counts.cpu().long(), per_expert.cumsum(0) if count_type == 0 else per_expert)
    flat = sorted((int(e), i) for i, e in enumerate(ids.flatten()))
    assert torch.equal(rows.cpu(), torch.stack([x[i // k] for _, i in flat]))
    assert [index.cpu().flatten().tolist()[i] for _, i in flat] == list(range(tokens * k))
    weights = torch.rand(tokens, k)
    combined = torch_npu.npu_moe_finalize_routing(
        rows * 2, None, None, None, weights.npu(), index, ids.npu(), drop_pad_mode=2
    )
    reference.assert_close(combined, 2 * x.double() * weights.double().sum(1, True), torch.float32)


def test_init_routing_keeps_the_active_experts_only() -> None:
    x, ids = torch.randn(4, 8), torch.tensor([[0, 3], [2, 1], [3, 2], [1, 0]], dtype=torch.int32)
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x.npu(), ids.npu(), active_num=8, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[2, 4], quant_mode=-1, row_idx_type=0,
    )  # fmt: skip
    assert counts.cpu().tolist() == [2, 2]
    assert torch.equal(rows.cpu()[:4], x[[1, 2, 0, 2]]), "expert 2: tokens 1 and 2, expert 3: tokens 0 and 2"
    assert index.cpu().flatten().tolist() == [-1, 2, 0, -1, 3, 1, -1, -1]


def test_init_routing_with_dynamic_quantisation() -> None:
    x, ids = torch.randn(3, 16).bfloat16(), routed(3, 4, 2)
    rows, _, _, scale = torch_npu.npu_moe_init_routing_v2(
        x.npu(), ids.npu(), active_num=6, expert_num=4, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, 4], quant_mode=1, row_idx_type=0,
    )  # fmt: skip
    order = [i // 2 for _, i in sorted((int(e), i) for i, e in enumerate(ids.flatten()))]
    source = x.double()[order]
    reference.assert_close(scale.flatten(), source.abs().amax(-1) / 127, torch.float32)
    difference = rows.cpu().double() * scale.cpu().double().view(-1, 1) - source
    assert (difference.abs() <= 0.51 * scale.cpu().double().view(-1, 1)).all()


def test_token_permute_and_unpermute() -> None:
    x, ids = torch.randn(5, 12), routed(5, 6, 3)
    permuted, where = torch_npu.npu_moe_token_permute(x.npu(), ids.npu())
    flat = sorted((int(e), i) for i, e in enumerate(ids.flatten()))
    assert torch.equal(permuted.cpu(), torch.stack([x[i // 3] for _, i in flat]))
    probabilities = torch.rand(5, 3)
    back = torch_npu.npu_moe_token_unpermute(permuted, where, probs=probabilities.npu())
    reference.assert_close(back, x.double() * probabilities.double().sum(1, True), torch.float32)


def test_compute_expert_tokens() -> None:
    sorted_experts = torch.tensor([0, 0, 2, 2, 2, 4], dtype=torch.int32)
    assert torch_npu.npu_moe_compute_expert_tokens(sorted_experts.npu(), 5).cpu().tolist() == [2, 2, 5, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("list_type", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul(transposed: bool, list_type: int, dtype: torch.dtype) -> None:
    counts = [3, 0, 4, 1]
    x, weight = torch.randn(8, 32).to(dtype), torch.randn(4, 32, 16).to(dtype)
    groups = torch.tensor(counts if list_type == 1 else [3, 3, 7, 8])
    moved = weight.transpose(1, 2).contiguous().npu().transpose(1, 2) if transposed else weight.npu()
    (actual,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [moved], group_list=groups.npu(), split_item=3, group_type=0, group_list_type=list_type
    )
    expected = torch.cat([part.double() @ w.double() for part, w in zip(x.split(counts), weight, strict=True)])
    assert actual.dtype == dtype
    reference.assert_close(actual, expected, dtype)


@pytest.fixture
def packed() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False  # its default


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("list_type", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_of_packed_weights(transposed: bool, list_type: int, dtype: torch.dtype, packed: None) -> None:
    """Groups that the kernels of few rows take, and one that those of many do; rows behind the last are not written."""
    counts = [3, 0, 20, 45, 1]
    x, weight = torch.randn(72, 64).to(dtype), torch.randn(5, 64, 48).to(dtype)
    groups = torch.tensor(counts) if list_type == 1 else torch.tensor(counts).cumsum(0)
    plain = weight.transpose(1, 2).contiguous() if transposed else weight
    moved = torch_npu.npu_format_cast(plain.npu(), 29)
    assert torch_npu.get_npu_format(moved) == 29
    graph, given, list_given = torch.npu.NPUGraph(), x.npu(), groups.npu()
    for captured in (False, True):
        with torch.npu.graph(graph) if captured else contextlib.nullcontext():
            (actual,) = torch_npu.npu_grouped_matmul(
                [given], [moved.transpose(1, 2) if transposed else moved], group_list=list_given, split_item=3,
                group_type=0, group_list_type=list_type,
            )  # fmt: skip
        if captured:
            graph.replay()
        parts = x.split([*counts, 3])[:-1]
        expected = torch.cat([part.double() @ w.double() for part, w in zip(parts, weight, strict=True)])
        reference.assert_close(actual[: sum(counts)], expected, dtype)


def test_grouped_matmul_of_packed_weights_with_a_bias(packed: None) -> None:
    x, weight, bias = torch.randn(5, 32).half(), torch.randn(2, 32, 16).half(), torch.randn(2, 16).half()
    (actual,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [torch_npu.npu_format_cast(weight.npu(), 29)], bias=[bias.npu()],
        group_list=torch.tensor([2, 5]).npu(), split_item=3, group_type=0, group_list_type=0,
    )  # fmt: skip
    parts = enumerate((slice(0, 2), slice(2, 5)))
    expected = torch.cat([x[part].double() @ weight[i].double() + bias[i] for i, part in parts])
    reference.assert_close(actual, expected, torch.float16)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 40, 16), torch.float16), ((2, 32, 24), torch.float16)])
def test_packed_weights_fill_their_fractals(shape: tuple[int, ...], dtype: torch.dtype, packed: None) -> None:
    weight = torch_npu.npu_format_cast(torch.randn(*shape).to(dtype).npu(), 29)
    x = torch.randn(3, shape[1]).to(dtype).npu()
    with pytest.raises(RuntimeError, match="in FRACTAL_NZ has to have matrices of whole fractals, 16 x 16"):
        torch_npu.npu_grouped_matmul(
            [x], [weight], group_list=torch.tensor([1, 3]).npu(), split_item=3, group_type=0, group_list_type=0
        )


def test_grouped_matmul_of_int8_with_scales() -> None:
    x = torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    weight = torch.randint(-127, 128, (2, 32, 16), dtype=torch.int8)
    scale, token = (torch.rand(2, 16) * 1e-3).bfloat16(), torch.rand(5)
    (actual,) = torch_npu.npu_grouped_matmul(
        [x.npu()], [weight.npu()], scale=[scale.npu()], per_token_scale=[token.npu()],
        group_list=torch.tensor([2, 5]).npu(), split_item=3, group_type=0, group_list_type=0,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = torch.cat(
        [x[part].double() @ weight[i].double() * scale[i].double() for i, part in enumerate((slice(0, 2), slice(2, 5)))]
    )
    reference.assert_close(actual, expected * token.double()[:, None], torch.bfloat16)


def test_grouped_matmul_without_a_group_list() -> None:
    xs, weights = [torch.randn(n, 8) for n in (3, 5)], [torch.randn(8, n) for n in (4, 6)]
    actual = torch_npu.npu_grouped_matmul(
        [x.npu() for x in xs], [w.npu() for w in weights], split_item=0, group_type=-1
    )
    for got, x, weight in zip(actual, xs, weights, strict=True):
        reference.assert_close(got, x.double() @ weight.double(), torch.float32)


def test_top_k_top_p() -> None:
    logits = torch.randn(4, 50) * 3
    k, p = torch.tensor([5, 50, 1, 20], dtype=torch.int32), torch.tensor([0.9, 0.5, 0.9, 1.0])
    actual = torch_npu.npu_top_k_top_p(logits.npu(), p.npu(), k.npu()).cpu()
    for row in range(4):
        order = logits[row].sort(descending=True).indices[: int(k[row])]
        probabilities = logits[row].double()[order].softmax(-1)
        before = probabilities.cumsum(0) - probabilities
        kept = set(order[before < p[row].double()].tolist())
        assert {i for i in range(50) if actual[row, i] != -torch.inf} == kept
        assert torch.equal(actual[row][list(kept)], logits[row][list(kept)])
