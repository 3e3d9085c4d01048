"""Weights in FRACTAL_NZ: which, what that changes in memory, and nothing in what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor, fx, nn

from npu_compiler import fusion_kernels
from npu_compiler.backend import AscendBackend
from npu_compiler.errors import OptionError
from npu_compiler.plan.weight_layout import FRACTAL_NZ, Layout, planned

ND = 2
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def formats() -> Iterator[None]:
    yield
    torch.npu.config.allow_internal_format = False  # its default; it can't be asked for


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, dtype=dtype), nn.Linear(inner, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def run(function: Callable[..., Any], *args: Any, policy: str = "all") -> tuple[list[Tensor], Layout]:
    """The results of a call, of the one that captures and of a replay; and what became of the weights."""
    torch._dynamo.reset()
    backend = AscendBackend()
    compiled = torch.compile(function, backend=backend, options={"weight_nz": policy})
    with torch.no_grad():
        found = [compiled(*args).cpu() for _ in range(3)]
    (entry,) = backend.compiled()
    assert entry.weights is not None
    assert str(entry.weights).splitlines()[0] in str(entry)
    return found, entry.weights


def layout_of(tensor: Tensor) -> int:
    return int(torch_npu.get_npu_format(tensor))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_weights_of_linears_change_their_layout_and_nothing_else(dtype: torch.dtype) -> None:
    """48 rows fill fractals, 40 columns don't: the storage grows to 48 columns."""
    model = Mlp(40, 48, dtype).npu()
    x, weight = torch.randn(5, 40, dtype=dtype).npu(), model.up.weight.detach().cpu().clone()
    with torch.no_grad():
        expected = model(x).cpu()
    found, layout = run(model, x)
    for result in found:
        assert torch.equal(result, expected)
    assert [layout_of(item.weight) for item in (model.up, model.down)] == [FRACTAL_NZ] * 2
    assert sorted(layout.converted.values()) == [(40 * 48 * 2, 48 * 48 * 2)] * 2
    assert torch.equal(model.up.weight.cpu(), weight), "read as a tensor it is what it was"
    assert str(layout).startswith("weights: 2 in FRACTAL_NZ, 7.5 KiB before and 9.0 KiB after")
    again, second = run(model, x)
    assert torch.equal(again[0], expected)
    assert second.left == dict.fromkeys(layout.converted, "in FRACTAL_NZ already")


def test_int8_weights() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-99, 99, (64, 96), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(96), requires_grad=False)
            self.other = nn.Linear(96, 32, bias=False, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch_npu.npu_quant_matmul(x, self.weight, self.scale, output_dtype=torch.bfloat16))

    model, x = Quantized().npu(), torch.randint(-99, 99, (3, 64), dtype=torch.int8).npu()
    with torch.no_grad():
        expected = model(x).cpu()
    found, layout = run(model, x, policy="quantized")
    assert all(torch.equal(result, expected) for result in found)
    assert (layout_of(model.weight), layout_of(model.other.weight)) == (FRACTAL_NZ, ND)
    assert list(layout.left.values()) == ["torch.bfloat16, which the policy 'quantized' leaves"]


class Experts(nn.Module):
    """Products of a mixture of experts, with weights as vLLM has them: [experts, out, in]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, inner, width).bfloat16())
        self.down = nn.Parameter(torch.randn(3, width, inner).bfloat16())

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        for weight in (self.up, self.down):
            (x,) = torch.ops.npu.npu_grouped_matmul(
                [x], [weight.transpose(1, 2)], group_list=counts, split_item=3, group_type=0, group_list_type=1
            )
        return x


def test_the_weights_of_experts() -> None:
    """Nothing is padded, so they take as much memory as before."""
    model, x = Experts(32, 48).npu(), torch.randn(6, 32).bfloat16().npu()
    weights, counts = [item.detach().cpu().double() for item in (model.up, model.down)], torch.tensor([2, 0, 4]).npu()
    found, layout = run(model, x, counts)
    assert [layout_of(item) for item in (model.up, model.down)] == [FRACTAL_NZ] * 2
    assert sorted(layout.converted.values()) == [(3 * 32 * 48 * 2, 3 * 32 * 48 * 2)] * 2
    assert torch.equal(model.up.cpu().double(), weights[0]), "read as a tensor it is what it was"
    first, second = ([weight[index].t() for index in (0, 0, 2, 2, 2, 2)] for weight in weights)
    inner = torch.stack([row @ w for row, w in zip(x.cpu().double(), first, strict=True)]).bfloat16().double()
    expected = torch.stack([row @ w for row, w in zip(inner, second, strict=True)])
    for result in found:
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error < 2**-7


def test_experts_that_do_not_fill_fractals_stay() -> None:
    model = Experts(32, 40).npu()
    _, layout = run(model, torch.randn(6, 32).bfloat16().npu(), torch.tensor([2, 0, 4]).npu())
    assert not layout.converted
    assert list(layout.left.values()) == ["does not fill its fractals, which npu_grouped_matmul asks for"] * 2


def test_auto_takes_large_weights_that_are_not_padded() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = ((256, 256), (256, 264), (264, 32))
            self.all = nn.Sequential(*(nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in sizes))

        def forward(self, x: Tensor) -> Tensor:
            return self.all(x)

    model = Three().npu()
    _, layout = run(model, torch.randn(2, 256).bfloat16().npu(), policy="auto")
    assert [layout_of(item.weight) for item in model.all] == [FRACTAL_NZ, ND, ND]  # type: ignore[arg-type]
    assert list(layout.left.values()) == ["smaller than 256, or padded: not worth it by the policy 'auto'"] * 2


def test_what_something_else_reads_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 16, dtype=torch.bfloat16)
            self.wide = nn.Linear(16, 16, bias=False)
            self.stack = nn.Parameter(torch.randn(3, 16, 16).bfloat16())

        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            x = self.table(ids)
            x = (self.wide(x.float()).bfloat16() @ other)[None].expand(3, -1, -1)
            return torch.matmul(x, self.stack) @ self.table.weight.t()

    model, other = Tied().npu(), torch.randn(16, 16).bfloat16().npu()
    _, layout = run(model, torch.tensor([1, 2]).npu(), other)
    assert not layout.converted
    assert sorted(layout.left.values()) == sorted(
        ["also read by aten.embedding.default", "torch.float32", "no parameter", *layout_of_stack(layout)]
    )


def test_a_product_that_takes_plain_rows_only_keeps_its_weight() -> None:
    """aclnnMatmulAllReduce refuses a weight in fractals. No rank is asked: nothing runs."""
    fusion_kernels.register()
    graph = fx.Graph()
    x, weight, other = map(graph.placeholder, ("x", "weight", "other"))
    turned = graph.call_function(torch.ops.aten.t.default, (weight,))
    fused = torch.ops.npu_fused.matmul_all_reduce.default
    summed = graph.call_function(fused, (x, turned, None, "0", 1))
    graph.output(graph.call_function(torch.ops.aten.mm.default, (summed, other)))
    for node, size in ((x, (4, 32)), (weight, (32, 32)), (other, (32, 32)), (turned, (32, 32)), (summed, (4, 32))):
        node.meta["val"] = torch.empty(size, dtype=torch.float16, device="meta")
    layout = planned(graph, "all")
    assert layout is not None
    assert [entry.name for entry in layout.candidates] == ["other"]
    (reason,) = layout.left.values()
    assert reason.startswith("also read by") and reason.endswith(", which takes plain rows only"), reason


def layout_of_stack(layout: Layout) -> list[str]:
    """A batch of matrices is read by aten.bmm, in which CANN's documents name no such layout."""
    return [reason for reason in layout.left.values() if "dimensions" in reason]


def test_a_part_of_a_larger_tensor_stays() -> None:
    whole = torch.randn(64, 32).bfloat16().npu()
    part = nn.Parameter(whole[:32], requires_grad=False)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = part

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    _, layout = run(Part(), torch.randn(2, 32).bfloat16().npu())
    assert list(layout.left.values()) == ["a part of a larger tensor"]
    assert layout_of(part) == ND


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(OptionError, match=r"(?s)weight_nz='al' is unknown.*did you mean 'all'"):
        AscendBackend()(None, [], options={"weight_nz": "al"})  # type: ignore[arg-type]
