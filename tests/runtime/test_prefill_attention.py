"""Attention of many rows, where keys are packed in blocks, against float64 references: several blocks of rows and keys,
and what hides keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference
from tests.runtime.test_attention_operators import BLOCK, COMPRESSED, DTYPES, Paged, check_sink


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def padded(query: Tensor, key: Tensor, value: Tensor, scale: float, **more: Any) -> tuple[Tensor, Tensor]:
    """Query [1, heads, tokens, width] through the operator: the output [tokens, heads, width] and the log-sum-exp."""
    output, lse = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), num_heads=query.shape[1], num_key_value_heads=key.shape[1], scale=scale,
        input_layout="BNSD", softmax_lse_flag=True, **more,
    )  # fmt: skip
    return output[0].transpose(0, 1), lse[0, ..., 0].T


def tensors(dtype: torch.dtype, queries: int, keys: int, heads: int, key_heads: int, width: int) -> list[Tensor]:
    shapes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(1, *shape, width).to(dtype) for shape in shapes]


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float, **more: Any) -> tuple[Tensor, Tensor]:
    return reference.attention(*(t[0].transpose(0, 1) for t in (query, key, value)), scale, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(2, 2, 16), (4, 2, 128), (3, 1, 48), (40, 1, 80)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 700), (150, 150), (300, 611), (270, 31)])
def test_blocks_of_rows_and_keys(
    queries: int, keys: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> None:
    """The last rows and keys fill no block; with fewer keys than queries the first rows see none."""
    query, key, value = tensors(dtype, queries, keys, heads, key_heads, width)
    hidden = reference.causal(queries, keys)
    output, lse = padded(query, key, value, width**-0.5, atten_mask=COMPRESSED.npu(), sparse_mode=3)
    expected, expected_lse = attended(query, key, value, width**-0.5, hidden=hidden)
    reference.assert_close(output, expected, dtype)
    seen = expected_lse.isfinite()
    assert torch.equal(lse.cpu().isfinite(), seen)
    reference.assert_close(lse.cpu()[seen], expected_lse[seen], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_layout", ["BSH", "BNSD", "NZ"])
def test_chunks_of_paged_prompts(cache_layout: str, dtype: torch.dtype) -> None:
    """A first chunk, a chunk behind a long past, a decode step and a short prompt in one call."""
    case = Paged([140, 200, 1, 20], [140, 900, 333, 20], dtype, heads=8, key_heads=2, width=64)
    output, lse = torch_npu.npu_fused_infer_attention_score(**case.arguments(cache_layout), softmax_lse_flag=True)
    expected, expected_lse = case.expected()
    reference.assert_close(output, expected, dtype)
    reference.assert_close(lse[..., 0], expected_lse, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "after"), [(70, 0), (300, 40), (0, 0)])
def test_windows_that_pass_over_whole_blocks(before: int, after: int, dtype: torch.dtype) -> None:
    queries, keys = 280, 640
    query, key, value = tensors(dtype, queries, keys, 2, 1, 64)
    rows, columns, shift = torch.arange(queries)[:, None], torch.arange(keys)[None], keys - queries
    hidden = (columns < rows + shift - before) | (columns > rows + shift + after)
    output, _ = padded(
        query, key, value, 0.125, atten_mask=COMPRESSED.npu(), sparse_mode=4, pre_tokens=before, next_tokens=after
    )
    reference.assert_close(output, attended(query, key, value, 0.125, hidden=hidden)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.125, -0.125, 0.0])
def test_masks_and_biases_of_many_rows(scale: float, dtype: torch.dtype) -> None:
    """Rows that see nothing of their first block among them."""
    query, key, value = tensors(dtype, 100, 400, 3, 3, 32)
    mask = torch.rand(100, 400) < 0.5
    mask[:20, :300] = True
    bias = torch.randn(1, 3, 100, 400).to(dtype)
    output, _ = padded(query, key, value, scale, atten_mask=mask.npu(), sparse_mode=1, pse_shift=bias.npu())
    expected, _ = attended(query, key, value, scale, hidden=mask, bias=bias[0])
    reference.assert_close(output, expected, dtype)
    output, _ = padded(query, key, value, scale)
    reference.assert_close(output, attended(query, key, value, scale)[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [-3.3e38, -1e30])
@pytest.mark.parametrize("queries", [1, 5, 100])
def test_rows_hidden_by_large_negative_numbers(queries: int, least: float, dtype: torch.dtype) -> None:
    """As transformers writes a mask: a row that sees no key is the mean of all values. Times log2(e) the first one is
    no float any more."""
    query, key, value = tensors(dtype, queries, 400, 3, 1, 32)
    bias = torch.zeros(1, 3, queries, 400, dtype=dtype)
    bias[:, :, :2] = least
    bias[:, :, 2:, :300] = least  # the first block of keys
    output, lse = padded(query, key, value, 0.125, pse_shift=bias.npu())
    expected, expected_lse = attended(query, key, value, 0.125, bias=bias[0])
    expected[:2] = value[0, 0].double().mean(0)  # log(400) is nothing beside these sums, so the reference can't divide
    reference.assert_close(output, expected, dtype)
    reference.assert_close(lse.cpu() / expected_lse, torch.ones_like(expected_lse), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_far_apart(dtype: torch.dtype) -> None:
    """Weights from 1 to less than the least float, and a maximum that grows from block to block."""
    query, key, value = tensors(dtype, 64, 1030, 2, 2, 32)
    key = (key * torch.linspace(1, 40, 1030)[:, None]).to(dtype)
    output, lse = padded(query, key, value, 1.0)
    expected, expected_lse = attended(query, key, value, 1.0)
    reference.assert_close(output, expected, dtype)
    reference.assert_close(lse, expected_lse, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinks_of_many_rows(dtype: torch.dtype) -> None:
    check_sink(Paged([150, 40], [300, 40], dtype), dtype)


def test_latent_attention_of_many_heads() -> None:
    """MLA decode in bfloat16: 64 heads share keys of 512 + 64, and the values are the keys without their rope part."""
    heads, lengths, dtype = 64, (400, 130), torch.bfloat16
    query, rope = torch.randn(2, 1, heads, 512).to(dtype), torch.randn(2, 1, heads, 64).to(dtype)
    latent, key_rope = torch.randn(8, BLOCK, 512).to(dtype), torch.randn(8, BLOCK, 64).to(dtype)
    table = torch.tensor([[2, 0, 7, 5], [3, 1, 0, 0]], dtype=torch.int32)
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), latent.npu(), latent.npu(), query_rope=rope.npu(), key_rope=key_rope.npu(),
        block_table=table.npu(), actual_seq_lengths_kv=list(lengths),
        num_heads=heads, num_key_value_heads=1, scale=0.05, input_layout="BSND",
        block_size=BLOCK,
    )  # fmt: skip
    for i, n in enumerate(lengths):
        values = latent[table[i].long()].flatten(0, 1)[:n]
        full = torch.cat((values, key_rope[table[i].long()].flatten(0, 1)[:n]), -1)
        expected, _ = reference.attention(torch.cat((query[i], rope[i]), -1), full[:, None], values[:, None], 0.05)
        reference.assert_close(output[i], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_prompts_through_torchs_function(dtype: torch.dtype) -> None:
    """aclnnFlashAttentionScore, with its softmax statistics."""
    lengths = [130, 17, 260]
    query = torch.randn(sum(lengths), 4, 32).to(dtype)
    key, value = (torch.randn(sum(lengths), 2, 32).to(dtype) for _ in range(2))
    ends = list(itertools.accumulate(lengths))
    output, largest, total, *_ = torch_npu.npu_fusion_attention(
        query.npu(), key.npu(), value.npu(), 4, "TND", scale=0.2, sparse_mode=3, atten_mask=COMPRESSED.npu(),
        actual_seq_qlen=ends, actual_seq_kvlen=ends,
    )  # fmt: skip
    found = [
        reference.attention(q, k, v, 0.2, reference.causal(len(q), len(q)))
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    ]
    reference.assert_close(output, torch.cat([o for o, _ in found]), dtype)
    lse = largest.cpu().double()[..., 0] + total.cpu().double()[..., 0].log()
    reference.assert_close(lse, torch.cat([s for _, s in found]), dtype)
