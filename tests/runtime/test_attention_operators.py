"""Attention and cache writes against float64 references: layouts, paging, masks, graphs and refusals."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK = 128
COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


class Paged:
    """Requests with keys in a cache of shuffled blocks, and the same keys as plain tensors for the reference."""

    def __init__(
        self,
        query_lengths: list[int],
        key_lengths: list[int],
        dtype: torch.dtype,
        heads: int = 4,
        key_heads: int = 2,
        width: int = 32,
    ) -> None:
        self.query_lengths, self.key_lengths = query_lengths, key_lengths
        self.heads, self.key_heads, self.width, self.dtype = heads, key_heads, width, dtype
        self.query = torch.randn(sum(query_lengths), heads, width).to(dtype)
        self.keys = [torch.randn(n, key_heads, width).to(dtype) for n in key_lengths]
        self.values = [torch.randn(n, key_heads, width).to(dtype) for n in key_lengths]
        most = max(1, max(-(-n // BLOCK) for n in key_lengths))
        blocks = len(key_lengths) * most + 3
        self.table = torch.randperm(blocks)[: len(key_lengths) * most].view(-1, most).int()
        # Rows that no request owns hold large numbers: reading one shows.
        self.key_cache = torch.full((blocks, BLOCK, key_heads, width), 300.0).to(dtype)
        self.value_cache = self.key_cache.clone()
        for row, key, value in zip(self.table.tolist(), self.keys, self.values, strict=True):
            for start in range(0, key.shape[0], BLOCK):
                part = slice(start, start + BLOCK)
                size = key[part].shape[0]
                self.key_cache[row[start // BLOCK], :size] = key[part]
                self.value_cache[row[start // BLOCK], :size] = value[part]

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def arguments(self, cache_layout: str = "BSH") -> dict[str, Any]:
        caches = [self.key_cache, self.value_cache]
        if cache_layout == "BSH":
            caches = [c.flatten(2) for c in caches]
        elif cache_layout == "BNSD":
            caches = [c.transpose(1, 2).contiguous() for c in caches]
        else:
            piece = 32 // self.dtype.itemsize
            caches = [c.unflatten(-1, (-1, piece)).permute(0, 2, 3, 1, 4).contiguous() for c in caches]
        return {
            "query": self.query.npu(),
            "key": caches[0].npu(),
            "value": caches[1].npu(),
            "atten_mask": COMPRESSED.npu(),
            "actual_seq_lengths": list(itertools.accumulate(self.query_lengths)),
            "actual_seq_lengths_kv": self.key_lengths,
            "block_table": self.table.npu(),
            "num_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "scale": self.scale,
            "input_layout": "TND",
            "sparse_mode": 3,
            "block_size": BLOCK,
        }

    def expected(self, key_lengths: list[int] | None = None) -> tuple[Tensor, Tensor]:
        outputs, sums = [], []
        lengths = key_lengths or self.key_lengths
        for query, key, value, n in zip(
            self.query.split(self.query_lengths), self.keys, self.values, lengths, strict=True
        ):
            hidden = reference.causal(query.shape[0], n)
            output, lse = reference.attention(query, key[:n], value[:n], self.scale, hidden)
            outputs.append(output)
            sums.append(lse)
        return torch.cat(outputs), torch.cat(sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_layout", ["BSH", "BNSD", "NZ"])
@pytest.mark.parametrize(
    ("query_lengths", "key_lengths"),
    [
        ([1, 1, 1], [1, 128, 300]),
        ([5, 1, 70], [5, 129, 200]),
        ([1, 0, 3], [40, 0, 3]),
    ],
    ids=["decode", "chunked-prefill", "empty-request"],
)
def test_paged_attention(
    query_lengths: list[int], key_lengths: list[int], cache_layout: str, dtype: torch.dtype
) -> None:
    case = Paged(query_lengths, key_lengths, dtype, width=64 if cache_layout == "NZ" else 32)
    output, lse = torch_npu.npu_fused_infer_attention_score(**case.arguments(cache_layout), softmax_lse_flag=True)
    expected, expected_lse = case.expected()
    assert output.dtype == dtype
    reference.assert_close(output, expected, dtype)
    reference.assert_close(lse[..., 0], expected_lse, dtype)


@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(2, 2, 16), (8, 1, 64), (16, 2, 128), (64, 1, 16), (3, 1, 48)]
)
@pytest.mark.parametrize("query_length", [1, 33])
def test_head_groups(heads: int, key_heads: int, width: int, query_length: int) -> None:
    case = Paged([query_length, 2], [140, 257], torch.float32, heads, key_heads, width)
    output, _ = torch_npu.npu_fused_infer_attention_score(**case.arguments())
    reference.assert_close(output, case.expected()[0], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(2, 2, 48), (4, 2, 128), (3, 1, 16), (8, 2, 64), (7, 1, 112), (8, 1, 32)]
)
def test_head_groups_that_decode(heads: int, key_heads: int, width: int, dtype: torch.dtype) -> None:
    """Groups of 1 to 8 query heads a key head, and lengths about those that are computed at once."""
    lengths = [1, 7, 8, 9, 63, 64, 65, 16, 127, 129, 200]
    case = Paged([1] * len(lengths), lengths, dtype, heads, key_heads, width)
    output, lse = torch_npu.npu_fused_infer_attention_score(**case.arguments(), softmax_lse_flag=True)
    expected, expected_lse = case.expected()
    reference.assert_close(output, expected, dtype)
    reference.assert_close(lse[..., 0], expected_lse, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(2, 2, 64), (5, 1, 128), (7, 1, 64), (16, 2, 128), (32, 2, 64)]
)
def test_head_groups_with_keys_in_fractal_order(heads: int, key_heads: int, width: int, dtype: torch.dtype) -> None:
    """Groups of 1 to 16 query heads a key head; decode steps and a chunk of three tokens."""
    case = Paged([1, 3], [140, 257], dtype, heads, key_heads, width)
    output, _ = torch_npu.npu_fused_infer_attention_score(**case.arguments("NZ"))
    reference.assert_close(output, case.expected()[0], dtype)


def test_one_cache_for_the_fused_write_and_attention() -> None:
    """What npu_scatter_pa_kv_cache writes as [blocks, heads * d / 16, block size, 16] attention reads as five
    dimensions."""
    key, value = (torch.randn(3, 2, 64).half() for _ in range(2))
    query = torch.randn(1, 4, 64).half()
    caches = [torch.zeros(2, 2 * 64 // 16, BLOCK, 16).half().npu() for _ in range(2)]
    slots = torch.tensor([BLOCK, BLOCK + 1, BLOCK + 2]).npu()
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), *caches, slots, cache_mode="PA_NZ")
    keys, values = (cache.view(2, 2, 4, BLOCK, 16) for cache in caches)
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(),
        keys,
        values,
        actual_seq_lengths=[1],
        actual_seq_lengths_kv=[3],
        block_table=torch.tensor([[1]], dtype=torch.int32).npu(),
        num_heads=4,
        num_key_value_heads=2,
        scale=0.125,
        input_layout="TND",
        block_size=BLOCK,
    )
    reference.assert_close(output, reference.attention(query, key, value, 0.125)[0], torch.float16)


def test_request_without_keys_gives_zeros_and_infinity() -> None:
    """Padded requests of a full graph have no keys."""
    case = Paged([1, 2], [9, 0], torch.float32)
    output, lse = torch_npu.npu_fused_infer_attention_score(**case.arguments(), softmax_lse_flag=True)
    assert output.cpu()[1:].eq(0).all() and lse.cpu()[1:].isinf().all()
    reference.assert_close(output[:1], case.expected()[0][:1], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND", "BSND_BNSD", "BSH_NBSD"])
@pytest.mark.parametrize("query_length", [1, 37])
def test_padded_layouts(layout: str, query_length: int, dtype: torch.dtype) -> None:
    batch, heads, key_heads, keys, width = 2, 4, 2, 90, 32
    query = torch.randn(batch, query_length, heads, width).to(dtype)
    key, value = (torch.randn(batch, keys, key_heads, width).to(dtype) for _ in range(2))
    lengths = [90, 51]

    def arranged(t: Tensor, name: str) -> Tensor:
        return {"BSH": lambda: t.flatten(2), "BSND": lambda: t, "BNSD": lambda: t.transpose(1, 2).contiguous()}[name]()

    source, _, target = layout.partition("_")
    output, _ = torch_npu.npu_fused_infer_attention_score(
        *(arranged(t, source).npu() for t in (query, key, value)),
        actual_seq_lengths_kv=lengths,
        num_heads=heads,
        num_key_value_heads=key_heads,
        scale=0.2,
        input_layout=layout,
    )
    expected = torch.stack(
        [reference.attention(query[i], key[i, :n], value[i, :n], 0.2)[0] for i, n in enumerate(lengths)]
    )
    order = {"": None, "BSND": None, "BNSD": (0, 2, 1, 3), "NBSD": (2, 0, 1, 3)}[target]
    if layout == "BSH":
        expected = expected.flatten(2)
    elif layout == "BNSD":
        expected = expected.transpose(1, 2)
    elif order:
        expected = expected.permute(order)
    reference.assert_close(output, expected, dtype)


def test_rows_behind_the_query_length_are_zero() -> None:
    query, key, value = (torch.randn(2, 6, 4, 16) for _ in range(3))
    output, lse = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), actual_seq_lengths=[6, 2], num_heads=4, scale=0.25,
        input_layout="BSND", softmax_lse_flag=True,
    )  # fmt: skip
    assert output.cpu()[1, 2:].eq(0).all() and lse.cpu()[1, :, 2:].isinf().all()
    reference.assert_close(output[1, :2], reference.attention(query[1, :2], key[1], value[1], 0.25)[0], torch.float32)


def attend_heads_first(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The reference for tensors [heads, tokens, 16]; gives [tokens, heads, 16]."""
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    return reference.attention(query, key, value, 0.25, hidden, bias)[0]


def packed_call(query: Tensor, key: Tensor, value: Tensor, ends: list[int], key_ends: list[int], **more: Any) -> Tensor:
    return torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), actual_seq_lengths=ends, actual_seq_lengths_kv=key_ends,
        num_heads=query.shape[1], num_key_value_heads=key.shape[1], scale=0.3, input_layout="TND", **more,
    )[0]  # fmt: skip


@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_keys_that_are_not_paged(with_mask: bool) -> None:
    lengths, key_lengths = [3, 64, 0, 7], [3, 100, 0, 7]
    query = torch.randn(sum(lengths), 4, 32)
    key, value = (torch.randn(sum(key_lengths), 2, 32) for _ in range(2))
    more = {"atten_mask": COMPRESSED.npu(), "sparse_mode": 3} if with_mask else {}
    output = packed_call(
        query, key, value, list(itertools.accumulate(lengths)), list(itertools.accumulate(key_lengths)), **more
    )
    parts = zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
    expected = torch.cat(
        [
            reference.attention(q, k, v, 0.3, reference.causal(len(q), len(k)) if with_mask else None)[0]
            for q, k, v in parts
        ]
    )
    reference.assert_close(output, expected, torch.float32)


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("queries", "keys"), [(20, 20), (20, 70), (33, 12)])
def test_sparse_modes(mode: int, queries: int, keys: int) -> None:
    query = torch.randn(1, 2, queries, 16)
    key, value = (torch.randn(1, 2, keys, 16) for _ in range(2))
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)[None]
    before, after = 5, 2
    mask = torch.rand(queries, keys) < 0.3
    shift = keys - queries
    hidden = {
        0: mask | (columns < rows - before) | (columns > rows + after),
        1: mask,
        2: columns > rows,
        3: columns > rows + shift,
        4: (columns < rows + shift - before) | (columns > rows + shift + after),
    }[mode]
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), atten_mask=(mask if mode < 2 else COMPRESSED).npu(), num_heads=2,
        scale=0.25, input_layout="BNSD", sparse_mode=mode, pre_tokens=before, next_tokens=after, inner_precise=2,
    )  # fmt: skip
    expected = attend_heads_first(query[0], key[0], value[0], hidden)
    reference.assert_close(output[0].transpose(0, 1), expected, torch.float32)


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 1, 7, 9), (2, 7, 9), (7, 9)])
def test_mask_shapes_broadcast(shape: tuple[int, ...]) -> None:
    query, key, value = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    mask = torch.rand(shape) < 0.4
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), atten_mask=mask.to(torch.int8).npu(), num_heads=3, scale=0.25,
        input_layout="BNSD", pre_tokens=2147483647, next_tokens=2147483647,
    )  # fmt: skip
    every = mask.reshape(-1, 7, 9).expand(2, 7, 9)
    for i in range(2):
        expected = attend_heads_first(query[i], key[i], value[i], every[i])
        reference.assert_close(output[i].transpose(0, 1), expected, torch.float32)


def test_bias_is_added_to_the_scores() -> None:
    query, key, value = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    bias = torch.randn(1, 3, 7, 9)
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), key.npu(), value.npu(), pse_shift=bias.npu(), num_heads=3, scale=0.25, input_layout="BNSD"
    )
    for i in range(2):
        expected = attend_heads_first(query[i], key[i], value[i], bias=bias[0])
        reference.assert_close(output[i].transpose(0, 1), expected, torch.float32)


def test_latent_attention_with_rope_parts() -> None:
    """MLA decode: 512 + 64 wide keys shared by all heads, values are the keys without their rope part."""
    heads, keys = 32, 150
    query, rope = torch.randn(2, 1, heads, 512), torch.randn(2, 1, heads, 64)
    latent, key_rope = torch.randn(4, BLOCK, 512), torch.randn(4, BLOCK, 64)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    output, _ = torch_npu.npu_fused_infer_attention_score(
        query.npu(), latent.npu(), latent.npu(), query_rope=rope.npu(), key_rope=key_rope.npu(),
        block_table=table.npu(), actual_seq_lengths_kv=[keys, 130],
        num_heads=heads, num_key_value_heads=1, scale=0.05, input_layout="BSND",
        block_size=BLOCK,
    )  # fmt: skip
    for i, n in enumerate((keys, 130)):
        values = latent[table[i].long()].flatten(0, 1)[:n]
        full = torch.cat((values, key_rope[table[i].long()].flatten(0, 1)[:n]), -1)
        expected, _ = reference.attention(torch.cat((query[i], rope[i]), -1), full[:, None], values[:, None], 0.05)
        reference.assert_close(output[i], expected, torch.float32, factor=4)


def check_sink(case: Paged, dtype: torch.dtype) -> None:
    """A learnable sink joins each head's denominator."""
    a = case.arguments()
    sink = torch.randn(4).to(dtype)
    output, _ = torch_npu.npu_fused_infer_attention_score_v2(
        a["query"], a["key"], a["value"], atten_mask=a["atten_mask"], actual_seq_qlen=a["actual_seq_lengths"],
        actual_seq_kvlen=a["actual_seq_lengths_kv"], block_table=a["block_table"], learnable_sink=sink.npu(),
        num_query_heads=4, num_key_value_heads=2, softmax_scale=case.scale, input_layout="TND", sparse_mode=3,
        block_size=BLOCK,
    )  # fmt: skip
    plain, lse = case.expected()
    share = torch.exp(lse) / (torch.exp(lse) + torch.exp(sink.double()))
    reference.assert_close(output, plain * share[..., None], dtype)


def test_learnable_sink_joins_the_denominator() -> None:
    check_sink(Paged([2, 1], [30, 9], torch.float32), torch.float32)


@pytest.mark.parametrize("masked", ["none", "causal", "bool"])
def test_scaled_dot_product_attention(masked: str) -> None:
    """torch's own function reaches aclnnFlashAttentionScore: Hugging Face models run on it."""
    query, key, value = torch.randn(2, 4, 19, 32), torch.randn(2, 2, 19, 32), torch.randn(2, 2, 19, 32)
    mask = torch.rand(2, 1, 19, 19) < 0.7
    mask[..., 0] = True
    options: dict[str, Any] = {"none": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": mask}}[masked]
    moved = {k: v.npu() if isinstance(v, Tensor) else v for k, v in options.items()}
    actual = torch.nn.functional.scaled_dot_product_attention(
        query.npu(), key.npu(), value.npu(), enable_gqa=True, **moved
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), enable_gqa=True, **options
    )
    reference.assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("slots", [torch.int32, torch.int64])
def test_cache_write(dtype: torch.dtype, slots: torch.dtype) -> None:
    key, value = (torch.randint(-100, 100, (5, 2, 16)).to(dtype) for _ in range(2))
    caches = [torch.zeros(3, BLOCK, 2, 16, dtype=dtype) for _ in range(2)]
    mapping = torch.tensor([0, 383, -1, 128, 5], dtype=slots)
    moved = [c.npu() for c in caches]
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), *moved, mapping.npu(), cache_mode="Norm")
    for cache, rows, actual in zip(caches, (key, value), moved, strict=True):
        for slot, row in zip(mapping.tolist(), rows, strict=True):
            if slot >= 0:
                cache[slot // BLOCK, slot % BLOCK] = row
        assert torch.equal(actual.cpu(), cache), "negative slots are skipped, the rest lands in its slot"


def test_cache_write_in_fractal_order() -> None:
    key, value = torch.randn(3, 2, 32).half(), torch.randn(3, 2, 16).half()
    caches = [torch.zeros(2, width * 2 // 16, BLOCK, 16).half() for width in (32, 16)]
    mapping = torch.tensor([1, 200, 127])
    moved = [c.npu() for c in caches]
    torch_npu.npu_scatter_pa_kv_cache(key.npu(), value.npu(), *moved, mapping.npu(), cache_mode="PA_NZ")
    for cache, rows, actual in zip(caches, (key, value), moved, strict=True):
        for slot, row in zip(mapping.tolist(), rows, strict=True):
            cache[slot // BLOCK, :, slot % BLOCK] = row.reshape(-1, 16)
        assert torch.equal(actual.cpu(), cache)


def captured(case: Paged, cache_layout: str) -> tuple[Any, Any, Any, dict[str, Any], Tensor]:
    """A graph that holds one attention task group behind an external event."""
    arguments = case.arguments(cache_layout)
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(**arguments)
    output, lse = torch.empty_like(arguments["query"]), torch.empty(1).npu()
    arguments |= {"workspace": workspace, "out": [output, lse]}
    event = torch.npu.ExternalEvent()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        torch_npu.npu_fused_infer_attention_score.out(**arguments)
        handle = torch.npu.graph_task_group_end(stream)
    return graph, event, handle, arguments, output


@pytest.mark.parametrize("cache_layout", ["BSH", "NZ"])
def test_lengths_of_a_captured_call_are_updated(cache_layout: str) -> None:
    case = Paged([1, 1], [7, 300], torch.float16, width=64)
    graph, event, handle, arguments, output = captured(case, cache_layout)
    assert arguments["workspace"].numel() > 0
    updates = torch.npu.Stream()
    for lengths in ([7, 300], [3, 129], [5, 1]):
        graph.replay()
        with torch.npu.stream(updates):
            torch.npu.graph_task_update_begin(updates, handle)
            torch_npu.npu_fused_infer_attention_score.out(**(arguments | {"actual_seq_lengths_kv": lengths}))
            torch.npu.graph_task_update_end(updates)
            event.record(updates)
        torch.npu.synchronize()
        reference.assert_close(output, case.expected(lengths)[0], torch.float16)


def test_lengths_are_updated_through_torch_npus_own_graph_class() -> None:
    case = Paged([1, 1], [7, 300], torch.float32)
    arguments = case.arguments()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        output, _ = torch_npu.npu_fused_infer_attention_score(**arguments)
    for lengths in ([7, 300], [2, 131]):
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
        torch.npu.synchronize()
        reference.assert_close(output, case.expected(lengths)[0], torch.float32)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"actual_seq_lengths": [1, 3]}, "has to end with the number of tokens"),
    ({"actual_seq_lengths": [3, 2]}, "no element may be below the one before"),
    ({"actual_seq_lengths_kv": None}, "actualSeqLengthsKv"),
    ({"actual_seq_lengths_kv": [5, 10000]}, "has room for"),
    ({"num_key_value_heads": 3}, "has to divide numHeads"),
    ({"num_heads": 2}, "has 4 heads"),
    ({"block_size": 16}, "multiple of 128"),
    ({"block_size": 256}, "has blocks of 128"),
    ({"sparse_mode": 2}, "sparseMode"),
    ({"sparse_mode": 9}, "sparseMode"),
    ({"atten_mask": None}, "attenMask"),
    ({"atten_mask": torch.zeros(4, 4, dtype=torch.bool)}, "compressed mask"),
    ({"atten_mask": torch.zeros(2048, 2048)}, "bool, int8 or uint8"),
    ({"inner_precise": 4}, "innerPrecise"),
    ({"antiquant_scale": torch.zeros(2)}, "not implemented"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[f"{next(iter(c))}-{m[:12]}" for c, m in REFUSALS])
def test_illegal_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    case = Paged([1, 1], [7, 300], torch.float32)
    moved = {k: v.npu() if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fused_infer_attention_score(**(case.arguments() | moved))


FRACTAL_REFUSALS: list[tuple[int, dict[str, Any], str]] = [
    (32, {}, "needs head size 64 or 128"),
    (64, {"key": torch.zeros(9, 2, 2, BLOCK, 32).half()}, "pieces of 32 bytes"),
    (64, {"block_size": 256}, "has blocks of 128"),
    (64, {"num_key_value_heads": 4}, "numKeyValueHeads is 4"),
]


@pytest.mark.parametrize(("width", "change", "message"), FRACTAL_REFUSALS, ids=[m for *_, m in FRACTAL_REFUSALS])
def test_keys_in_fractal_order_that_are_refused(width: int, change: dict[str, Any], message: str) -> None:
    case = Paged([1, 1], [7, 300], torch.float16, width=width)
    moved = {k: v.npu() if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fused_infer_attention_score(**(case.arguments("NZ") | moved))


def test_strided_cache_is_refused() -> None:
    case = Paged([1, 1], [7, 300], torch.float32)
    both = torch.cat((case.key_cache.flatten(2), case.value_cache.flatten(2)), -1).npu()
    halves = dict(zip(("key", "value"), both.chunk(2, -1), strict=True))
    with pytest.raises(RuntimeError, match="has to be contiguous"):
        torch_npu.npu_fused_infer_attention_score(**(case.arguments() | halves))


def test_wrong_device_contents_fail_the_stream() -> None:
    """What only the kernel can see is reported at the next synchronisation, naming the operator and the element."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.runtime.device_content_checks"], capture_output=True, text=True, timeout=120
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, child.stderr[-2000:]
    messages = json.loads(lines[0].removeprefix("RESULT "))
    for name, expected in {
        "position": "position 9 of token 1 is outside the cos/sin cache of 9 rows",
        "slot": "slot_mapping has 128 for token 0",
        "index": "index has 160 for token 1",
        "mask": "has to be 1 above the diagonal",
        "block": "names block 99",
    }.items():
        assert expected in messages[name] + child.stderr, f"{name}: {messages[name]}"
        assert "507015" in messages[name], messages[name]
