"""The packed QKV projection to queries and paged caches in one operator, against float64."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference

DTYPES = [torch.float16, torch.bfloat16]
HEAD, BLOCK, BLOCKS = 128, 32, 5
EPSILON = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


@dataclass
class Projection:
    """Arguments of the operator, on the CPU, and what it has to give."""

    tokens: int
    query_heads: int
    key_heads: int
    dtype: torch.dtype
    slots: list[int] | None = None
    quantised: bool = False
    offsets: bool = False
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(self.dtype)

        columns = (self.query_heads + 2 * self.key_heads) * HEAD
        self.slots = self.slots or torch.randperm(BLOCKS * BLOCK)[: self.tokens].tolist()
        piece = 32 if self.quantised else 16
        cache = torch.full((BLOCKS, self.key_heads * HEAD // piece, BLOCK, piece), 9)
        cache = cache.to(torch.int8 if self.quantised else self.dtype)
        self.tensors = {
            "qkv": random(self.tokens, columns),
            "q_gamma": random(HEAD),
            "k_gamma": random(HEAD),
            "cos": random(self.tokens, HEAD),
            "sin": random(self.tokens, HEAD),
            "index": torch.tensor(self.slots, dtype=torch.int64),
            "q_out": torch.zeros(self.tokens, self.query_heads * HEAD, dtype=self.dtype),
            "k_cache": cache,
            "v_cache": cache.clone(),
        }
        if self.quantised:
            for name in ("k_scale", "v_scale"):
                self.tensors[name] = torch.rand(self.key_heads, HEAD) * 0.05 + 0.01
            if self.offsets:
                for name in ("k_offset", "v_offset"):
                    self.tensors[name] = torch.randn(self.key_heads, HEAD) * 5

    def arguments(self) -> dict[str, Any]:
        return {name: tensor.npu() for name, tensor in self.tensors.items()} | self.attributes()

    def attributes(self) -> dict[str, Any]:
        heads = self.query_heads + 2 * self.key_heads
        return {
            "qkv_size": [1, self.tokens, heads, HEAD],
            "head_nums": [self.query_heads, self.key_heads, self.key_heads],
            "epsilon": EPSILON,
            "cache_mode": "PA_NZ",
        }

    def expected_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, 128] in float64, before quantisation."""
        t = self.tensors
        rows = t["qkv"].double().view(self.tokens, -1, HEAD)
        query, key, value = rows.split([self.query_heads, self.key_heads, self.key_heads], dim=1)
        cos, sin = t["cos"].double()[:, None], t["sin"].double()[:, None]

        def finish(x: Tensor, gamma: Tensor) -> Tensor:
            normed, _ = reference.rms_norm(x, gamma, EPSILON)
            return normed * cos + reference.rotate_half(normed) * sin

        return finish(query, t["q_gamma"]), finish(key, t["k_gamma"]), value

    def expected_cache(self, which: str, rows: Tensor) -> Tensor:
        """The cache as [blocks, block size, heads, 128] in float64, rows of other slots unchanged."""
        if self.quantised:
            rows = rows / self.tensors[f"{which}_scale"].double()
            if self.offsets:
                rows = rows + self.tensors[f"{which}_offset"].double()
            rows = rows.round().clamp(-128, 127)
        cache = torch.full((BLOCKS * BLOCK, self.key_heads, HEAD), 9.0, dtype=torch.float64)
        for slot, row in zip(self.slots or [], rows, strict=True):
            if slot >= 0:
                cache[slot] = row
        return cache.view(BLOCKS, BLOCK, self.key_heads, HEAD)


def plain(cache: Tensor, heads: int) -> Tensor:
    """[blocks, heads * 128 / c, block size, c] as [blocks, block size, heads, 128]."""
    return cache.cpu().permute(0, 2, 1, 3).reshape(BLOCKS, BLOCK, heads, HEAD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (16, 2), (3, 1)])
def test_queries_and_caches(query_heads: int, key_heads: int, dtype: torch.dtype) -> None:
    case = Projection(7, query_heads, key_heads, dtype, slots=[3, -1, 0, 159, 31, 32, -1])
    arguments = case.arguments()
    torch_npu.npu_qkv_rms_norm_rope_cache(**arguments)
    query, key, value = case.expected_rows()
    reference.assert_close(arguments["q_out"], query.flatten(1), dtype)
    reference.assert_close(plain(arguments["k_cache"], key_heads), case.expected_cache("k", key), dtype)
    assert torch.equal(plain(arguments["v_cache"], key_heads).double(), case.expected_cache("v", value))


@pytest.mark.parametrize("offsets", [True, False])
def test_caches_are_quantised(offsets: bool) -> None:
    case = Projection(9, 2, 2, torch.bfloat16, quantised=True, offsets=offsets)
    arguments = case.arguments()
    torch_npu.npu_qkv_rms_norm_rope_cache(**arguments)
    _, key, value = case.expected_rows()
    for which, rows in (("k", key), ("v", value)):
        actual = plain(arguments[f"{which}_cache"], 2).double()
        difference = (actual - case.expected_cache(which, rows)).abs()
        assert difference.max() <= 1, "int8 values differ by a rounding at most"
        assert (difference > 0).double().mean() < 0.01
        assert actual.min() == -128 and actual.max() == 127, "and are saturated"


def test_rows_before_quantisation_are_given_on_request() -> None:
    case = Projection(4, 4, 1, torch.float16, quantised=True)
    outputs = torch_npu.npu_qkv_rms_norm_rope_cache(**case.arguments(), is_output_qkv=True)
    for actual, expected in zip(outputs, case.expected_rows(), strict=True):
        reference.assert_close(actual, expected.flatten(1), torch.float16)


def test_the_functional_form_leaves_its_arguments_alone() -> None:
    case = Projection(3, 2, 1, torch.bfloat16)
    arguments = case.arguments()
    *_, q_out, k_cache, v_cache = torch_npu.npu_qkv_rms_norm_rope_cache_functional(**arguments)
    query, key, value = case.expected_rows()
    reference.assert_close(q_out, query.flatten(1), torch.bfloat16)
    reference.assert_close(plain(k_cache, 1), case.expected_cache("k", key), torch.bfloat16)
    assert torch.equal(plain(v_cache, 1).double(), case.expected_cache("v", value))
    for name in ("q_out", "k_cache", "v_cache"):
        assert torch.equal(arguments[name].cpu(), case.tensors[name])


def test_columns_of_a_wider_projection_are_read_where_they_lie() -> None:
    case = Projection(5, 2, 1, torch.float16)
    arguments = case.arguments()
    wide = torch.cat((case.tensors["qkv"], torch.zeros(5, 64).half()), dim=1).npu()
    torch_npu.npu_qkv_rms_norm_rope_cache(**(arguments | {"qkv": wide[:, : 4 * HEAD]}))
    reference.assert_close(arguments["q_out"], case.expected_rows()[0].flatten(1), torch.float16)


def test_it_is_one_task_of_a_graph_and_reads_new_slots_at_replay() -> None:
    case = Projection(2, 2, 1, torch.bfloat16, slots=[0, 1])
    arguments = case.arguments()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch_npu.npu_qkv_rms_norm_rope_cache(**arguments)
    arguments["index"].copy_(torch.tensor([40, 7]))
    graph.replay()
    torch.npu.synchronize()
    case.slots = [40, 7]
    _, key, _ = case.expected_rows()
    reference.assert_close(plain(arguments["k_cache"], 1), case.expected_cache("k", key), torch.bfloat16)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"qkv": torch.zeros(3, 4 * HEAD)}, "has to be float16 or bfloat16"),
    ({"qkv_size": [1, 3, 8, 64]}, "takes 128 only"),
    ({"qkv_size": [1, 4, 4, 128]}, "has to have shape"),
    ({"head_nums": [1, 1, 2]}, "as many key as value heads"),
    ({"cos": torch.zeros(3, HEAD)}, "has to have the dtype of qkv"),
    ({"sin": torch.zeros(3, 64).half()}, "has to have shape"),
    ({"index": torch.zeros(3, dtype=torch.int32)}, "has to be int64"),
    ({"cache_mode": "Norm"}, "has to be PA_NZ"),
    ({"k_cache": torch.zeros(BLOCKS, 4, BLOCK, 32, dtype=torch.int8)}, "is needed for an int8 kCache"),
    ({"k_scale": torch.ones(1, HEAD)}, "is needed for an int8 kCache"),
    ({"v_cache": torch.zeros(BLOCKS, 8, 24, 16).half()}, "multiple of 16"),
    ({"v_cache": torch.zeros(BLOCKS, 16, BLOCK, 16).half()}, "for 1 heads"),
    ({"v_cache": torch.zeros(BLOCKS + 1, 8, BLOCK, 16).half()}, "has 6 blocks"),
    ({"qkv_size": [3, 1, 4, 128], "k_cache": torch.zeros(2, 8, BLOCK, 16).half()}, "has 5 blocks of 32 rows"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[f"{next(iter(c))}-{m[-12:]}" for c, m in REFUSALS])
def test_illegal_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    moved = {k: v.npu() if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_qkv_rms_norm_rope_cache(**(Projection(3, 2, 1, torch.float16).arguments() | moved))


def test_caches_too_small_for_the_requests_are_refused() -> None:
    arguments = Projection(6, 2, 1, torch.float16).arguments() | {"qkv_size": [6, 1, 4, HEAD]}
    with pytest.raises(RuntimeError, match="pass packed tokens as one request"):
        torch_npu.npu_qkv_rms_norm_rope_cache(**arguments)


def test_examples_of_the_page_on_operators() -> None:
    page = Path(__file__).parents[2] / "docs" / "llm_operators.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})
