"""All shapes of a program share one pool: it is as large as the largest needs, and no result is lost in it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.errors import StaleOutputError
from tests.compiler.test_capture import Compiled

SIZES = list(range(8, 281, 8))
MIB = 1 << 20


def wide(x: Tensor) -> Tensor:
    """Two results of 128 KiB a row, the second of which is the output."""
    return torch.relu(x.repeat(1, 32768 // x.shape[1]).sin()) * 2


def rows(count: int, columns: int = 8) -> Tensor:
    x = torch.rand(count, columns).npu()
    torch._dynamo.mark_dynamic(x, 0)
    return x


def reserved(sizes: list[int], **options: Any) -> float:
    """MiB that the pool has after captures of `sizes`, in this order."""
    compiled = Compiled(wide, options=options)
    for size in sizes:
        compiled(rows(size))
    assert len(compiled.ledger.captures) == len(sizes)
    return sum(entry.mebibytes for entry in compiled.ledger.captures)


def test_35_sizes_take_what_the_largest_takes() -> None:
    largest = reserved(SIZES[-1:])
    assert largest >= SIZES[-1] * 32768 * 4 / MIB
    torch._dynamo.reset()
    assert reserved(SIZES[::-1]) <= 1.05 * largest
    torch._dynamo.reset()
    assert reserved(SIZES, capture_sizes=SIZES) <= 1.05 * largest, "listed sizes: room for the largest comes first"


def test_outputs_that_are_not_copied_keep_their_memory() -> None:
    """The counterpart: what the caller gets to see must not go to the next shape."""
    outputs = sum(size * 32768 * 4 for size in SIZES[-5:]) / MIB
    assert reserved(SIZES[:-6:-1], clone_outputs=False) >= outputs


def several(x: Tensor) -> tuple[Tensor, ...]:
    """Outputs alone, in shared memory, with gaps, transposed, and an input."""
    y = torch.exp(x) + x.shape[0]
    z = y @ x.transpose(0, 1)
    return y, y[:, 1], z.transpose(0, 1), (z * 2)[:, ::2], x, z.sum(-1)


@pytest.mark.parametrize("order", ["largest first", "smallest first", "mixed"])
@pytest.mark.parametrize("options", [{}, {"multistream": "auto", "stream_limit": 3}, {"capture_limit": 5}])
def test_interleaved_replays_of_many_shapes(order: str, options: dict[str, Any]) -> None:
    sizes = [4, 5, 7, 9, 17, 33, 64, 96]
    mixed = random.Random(1)
    calls = {"largest first": sizes[::-1], "smallest first": sizes, "mixed": mixed.sample(sizes, len(sizes))}[order]
    calls = [*calls, *(mixed.choice(sizes) for _ in range(24))]
    compiled = Compiled(several, options=options)
    kept = []
    for size in calls:
        x = rows(size)
        kept.append((x, compiled(x)))
    for x, results in kept:
        for result, expected in zip(results, several(x.cpu()), strict=True):
            torch.testing.assert_close(result.cpu(), expected)
    assert results[1].data_ptr() == results[0][:, 1].data_ptr(), "an alias stays one"
    limit = options.get("capture_limit", len(sizes))
    assert len(compiled.ledger.captures) - len(compiled.ledger.evicted) == limit
    assert compiled.ledger.replays > 5


def test_replay_of_another_shape_may_not_overwrite_an_output_in_use() -> None:
    """The first graph's intermediate results lie where the second one's output was put."""
    compiled = Compiled(wide, options={"clone_outputs": False})
    large, small = rows(64), rows(32)
    compiled(large)
    compiled(small)
    held = compiled(small)
    before = held.cpu()
    with pytest.raises(StaleOutputError, match="output 0 of an earlier call is still in use"):
        compiled(large)
    assert torch.equal(held.cpu(), before)
    del held
    torch.testing.assert_close(compiled(large).cpu(), wide(large.cpu()))


def test_output_in_use_outlives_its_graph() -> None:
    compiled = Compiled(wide, options={"clone_outputs": False, "capture_limit": 1})
    first, second = rows(4), rows(6)
    compiled(first)
    held = compiled(first)
    before = held.cpu()
    compiled(second)  # drives the graph of `first` out
    with pytest.raises(StaleOutputError):
        compiled(second)
    assert torch.equal(held.cpu(), before)
    del held
    torch.testing.assert_close(compiled(second).cpu(), wide(second.cpu()))


def test_recapture_takes_the_memory_of_the_graph_it_replaces() -> None:
    def step(state: Tensor, x: Tensor) -> Tensor:
        state.add_(1)
        return wide(x) + state.sum()

    compiled = Compiled(step)
    x, kept, reserved = torch.rand(64, 8).npu(), [], []
    for index in range(5):
        kept.append(torch.full((3,), float(index)).npu())
        for _ in range(6):  # often enough that the next capture pays
            result = compiled(kept[-1], x)
        torch.testing.assert_close(result.cpu(), wide(x.cpu()) + kept[-1].cpu().sum())
        del result
        torch.npu.empty_cache()
        reserved.append(torch.npu.memory_reserved())
    assert len(compiled.ledger.captures) == 5
    assert compiled.ledger.captures[0].mebibytes >= 16
    assert reserved == reserved[:1] * 5
