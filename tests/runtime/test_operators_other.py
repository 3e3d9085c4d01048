"""Reductions, indexing, shapes, products, normalisation and sorting on the device against PyTorch on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from .operator_cases import assert_same_as_cpu, make

X = make((4, 6), torch.float32)
Y = make((4, 6), torch.float32, seed=1)
INDEX = torch.tensor([2, 0, 3])
GRID = torch.randint(0, 4, (4, 6), generator=torch.Generator().manual_seed(2))

REDUCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: x.sum(),
    "sum_dim": lambda x: x.sum(0),
    "sum_last": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(),
    "mean_last": lambda x: x.mean(-1),
    "prod": lambda x: x.prod(1),
    "max": lambda x: x.max(),
    "min_dim": lambda x: tuple(x.min(1)),
    "amax": lambda x: x.amax(0),
    "argmax": lambda x: x.argmax(),
    "argmax_last": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(0),
    "any": lambda x: (x > 1).any(1),
    "all": lambda x: (x > -9).all(),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1, correction=0),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "norm": lambda x: x.norm(),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "cumsum": lambda x: x.cumsum(1),
    "cummax": lambda x: tuple(x.cummax(1)),
    "softmax": lambda x: x.softmax(-1),
    "softmax_first": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(-1),
    "median": lambda x: tuple(x.median(1)),
    "layer_norm": lambda x: functional.layer_norm(x, (6,)),
    "group_norm": lambda x: functional.group_norm(x, 2),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name: str) -> None:
    for x in (X, make((6, 4), torch.float32).t(), make((3, 2, 6), torch.float32)):
        if name in ("group_norm", "layer_norm") and x.dim() == 2 and not x.is_contiguous():
            continue
        if name == "group_norm" and x.dim() == 3:
            x = make((3, 2, 6), torch.float32)
        assert_same_as_cpu(REDUCTIONS[name], x)


@pytest.mark.parametrize("name", ["sum_last", "mean_last", "softmax", "argmax_last"])
@pytest.mark.parametrize("width", [1, 31, 64, 1000])
def test_prepared_row_reductions(name: str, width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_as_cpu(REDUCTIONS[name], make((3, width), dtype))


def test_argmax_takes_the_first_of_equals_and_nan() -> None:
    x = torch.zeros(3, 70)
    x[0, [5, 40]] = 1
    x[1, [50, 20]] = float("nan")
    assert_same_as_cpu(lambda t: t.argmax(-1), x)


INDEXING: dict[str, Callable[..., Any]] = {
    "index": lambda x, y, i, g: x[i],
    "index_two": lambda x, y, i, g: x[i, i + 1],
    "index_second": lambda x, y, i, g: x[:, i],
    "mask": lambda x, y, i, g: x[x > 0],
    "index_put": lambda x, y, i, g: x.clone().index_put_((i,), y[:3]),
    "index_put_accumulate": lambda x, y, i, g: x.clone().index_put_((i,), y[:3], accumulate=True),
    "set_slice": lambda x, y, i, g: x.clone().index_fill_(0, i, 2.0),
    "index_select": lambda x, y, i, g: x.index_select(0, i),
    "index_select_columns": lambda x, y, i, g: x.index_select(1, i),
    "index_add": lambda x, y, i, g: x.clone().index_add_(0, i, y[:3], alpha=2),
    "index_copy": lambda x, y, i, g: x.clone().index_copy_(0, i, y[:3]),
    "gather": lambda x, y, i, g: x.gather(0, g),
    "scatter": lambda x, y, i, g: x.clone().scatter_(0, i[None, :], y[:1, :3].contiguous()),
    "scatter_value": lambda x, y, i, g: x.clone().scatter_(1, i[:, None], 7.0),
    "scatter_add": lambda x, y, i, g: x.clone().scatter_add_(0, g, y),
    "take": lambda x, y, i, g: torch.take(x, i),
    "nonzero": lambda x, y, i, g: (x > 0).nonzero(),
    "masked_select": lambda x, y, i, g: torch.masked_select(x, y > 0),
    "embedding": lambda x, y, i, g: functional.embedding(i, x),
    "topk": lambda x, y, i, g: tuple(x.topk(2, 1)),
    "sort": lambda x, y, i, g: tuple(x.sort(1, descending=True)),
    "argsort": lambda x, y, i, g: x.argsort(0),
    "kthvalue": lambda x, y, i, g: tuple(x.kthvalue(2, 1)),
    "unique": lambda x, y, i, g: torch.unique(g, return_inverse=True, return_counts=True),
    "searchsorted": lambda x, y, i, g: torch.searchsorted(x.sort(1).values, y),
    "one_hot": lambda x, y, i, g: functional.one_hot(i, 5),
    "bincount": lambda x, y, i, g: torch.bincount(i),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing(name: str) -> None:
    assert_same_as_cpu(INDEXING[name], X, Y, INDEX, GRID)


SHAPING: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "cat_rows": lambda x, y: torch.cat([x, y]),
    "cat_columns": lambda x, y: torch.cat([x, y[:, :2], x], 1),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "split": lambda x, y: [t.clone() for t in x.split([2, 4], 1)],
    "repeat": lambda x, y: x.repeat(2, 1, 3),
    "repeat_interleave": lambda x, y: x.repeat_interleave(3, 1),
    "flip": lambda x, y: x.flip(1),
    "roll": lambda x, y: x.roll(2, 1),
    "tril": lambda x, y: x.tril(),
    "triu": lambda x, y: x.triu(1),
    "pad": lambda x, y: functional.pad(x, (1, 2), value=3.0),
    "contiguous": lambda x, y: x.t().contiguous(),
    "slice_copy": lambda x, y: x[:, 1:4].contiguous(),
    "permute": lambda x, y: x.view(2, 2, 6).permute(2, 0, 1).contiguous(),
    "expand": lambda x, y: x[:1].expand(5, 6).contiguous(),
    "arange": lambda x, y: torch.arange(1, 9, 2, device=x.device),
    "linspace": lambda x, y: torch.linspace(0, 1, 7, device=x.device),
    "eye": lambda x, y: torch.eye(3, 4, device=x.device),
    "full": lambda x, y: torch.full((2, 3), 2.5, device=x.device),
    "zeros": lambda x, y: torch.zeros(3, device=x.device),
    "foreach": lambda x, y: torch._foreach_add([x, y], [y, x], alpha=2),
    "foreach_mul": lambda x, y: torch._foreach_mul([x, y], 3.0),
}


@pytest.mark.parametrize("name", SHAPING)
def test_shaping(name: str) -> None:
    assert_same_as_cpu(SHAPING[name], X, Y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 40])
def test_matrix_product(dtype: torch.dtype, m: int) -> None:
    for k, n in [(32, 48), (33, 17), (1, 5), (70, 1), (128, 130)]:
        a = make((m, k), dtype)
        b = make((n, k), dtype, seed=1)
        scale = torch.tensor(1.0)
        expected = (a.double() @ b.double().t()) / k
        for product in (
            a.npu() @ b.npu().t(),
            a.npu() @ b.t().contiguous().npu(),
            functional.linear(a.npu(), b.npu()),
        ):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(product.cpu().double() / k, expected * scale, rtol=tolerance, atol=tolerance)
        bias = make((n,), dtype, seed=3)
        assert_same_as_cpu(lambda x, w, v: functional.linear(x, w, v) / 8, a, b, bias)


def test_batched_products() -> None:
    a, b, c = (make(s, torch.float32, seed=i) for i, s in enumerate([(2, 3, 4), (2, 4, 5), (2, 3, 5)]))
    assert_same_as_cpu(torch.bmm, a, b)
    assert_same_as_cpu(lambda x, y, z: torch.baddbmm(z, x, y, alpha=0.5), a, b, c)
    assert_same_as_cpu(lambda x, y: torch.mv(x[0], y[0, :, 0]), a, b)
    assert_same_as_cpu(lambda x, y: x @ y[0], a, b)


def test_printing_a_tensor() -> None:
    text = repr(torch.tensor([[1.5, -2.0], [float("nan"), 3e7]]).npu())
    assert "1.5000e+00" in text and "nan" in text and "device='npu:0'" in text


def test_random_numbers_follow_the_seed() -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(7)
        device = {"device": "npu"}
        return [
            torch.rand(1000, **device).cpu(),
            torch.randn(1000, **device).cpu(),
            torch.randint(0, 10, (1000,), **device).cpu(),
            torch.randperm(100, **device).cpu(),
            torch.empty(1000, **device).exponential_().cpu(),
            torch.bernoulli(torch.full((1000,), 0.3).npu()).cpu(),
            torch.multinomial(torch.tensor([0.0, 1.0, 3.0]).npu(), 1000, replacement=True).cpu(),
        ]

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    uniform, normal, integers, permutation, exponential, coin, choice = first
    assert not torch.equal(uniform, torch.rand(1000, device="npu").cpu())
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05
    assert abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.1
    assert set(integers.tolist()) == set(range(10))
    assert torch.equal(permutation.sort().values, torch.arange(100))
    assert exponential.min() > 0 and abs(exponential.mean() - 1) < 0.15
    assert abs(coin.mean() - 0.3) < 0.06
    assert choice.min() > 0 and abs((choice == 2).float().mean() - 0.75) < 0.06


def test_captured_operators_read_new_inputs() -> None:
    x, w, index = X.npu(), make((6, 6), torch.float32, seed=5).npu(), INDEX.npu()

    def step(x: torch.Tensor, w: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = functional.silu(x @ w + x) * 2
        return h, h.softmax(-1), torch.cat([h, x], 1), h[index], h.argmax(-1), torch.where(h > 0, h, x)

    graph = torch.npu.NPUGraph()
    step(x, w, index)
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        results = step(x, w, index)
    for seed in (11, 12):
        fresh = make((4, 6), torch.float32, seed=seed)
        x.copy_(fresh)
        graph.replay()
        torch.npu.synchronize()
        for got, expected in zip(results, step(fresh, w.cpu(), index.cpu()), strict=True):
            torch.testing.assert_close(got.cpu(), expected)


FAULT = """
import torch
x = torch.ones(4, 6, device="npu")
torch.nn.functional.embedding(torch.tensor([99]).npu(), x)
torch.npu.synchronize()
"""


def test_an_index_out_of_range_names_the_operator() -> None:
    # In a process of its own: a failed kernel leaves its stream unusable, as on a card.
    result = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "aclnnEmbedding: index 99 at position 0 is outside of 0..3" in result.stderr
