"""What is read of a watched value is what the module gives in eager PyTorch on the CPU, for every replay."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_compiler
from npu_compiler.backend import AscendBackend
from npu_compiler.errors import WatchWarning
from npu_compiler.fusion_kernels.watched import Seen
from tests.passes.test_watch import Model


def hooked(model: nn.Module, path: str) -> list[Tensor]:
    """Each output of a module of `model`, as long as that is called."""
    found: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: found.append(output.clone()))
    return found


def check(seen: Seen, expected: Tensor) -> None:
    assert (seen.shape, seen.dtype) == (tuple(expected.shape), expected.dtype)
    wide = expected.double()
    finite = wide[wide.isfinite()]
    assert (seen.nans, seen.infinite) == (int(wide.isnan().sum()), int(wide.isinf().sum()))
    assert seen.statistics is not None
    found = [seen.statistics.smallest, seen.statistics.largest, seen.statistics.mean]
    torch.testing.assert_close(
        found, [float(finite.min()), float(finite.max()), float(finite.mean())], rtol=1e-4, atol=1e-5
    )
    assert seen.statistics.count == expected.numel()
    if seen.value is not None:
        torch.testing.assert_close(seen.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"capture": False}, {"multistream": "auto"}, {"clone_outputs": False}],
    ids=str,
)
def test_values_and_statistics_are_those_of_eager(options: dict[str, Any]) -> None:
    npu_compiler.watched()
    reference = Model().eval()
    places = ["layers.0.gate:values", "layers.1.gate:stats"]
    run = torch.compile(
        copy.deepcopy(reference).npu(), backend=AscendBackend(), dynamic=True, options={"watch": places, **options}
    )
    outputs = [hooked(reference, f"layers.{layer}.gate") for layer in (0, 1)]
    with torch.inference_mode():
        for rows in (4, 4, 6, 4, 6, 4):
            x = torch.randn(rows, 8)
            reference(x)
            run(x.npu())
    found = npu_compiler.watched()
    for layer, what in enumerate(("values", "stats")):
        mine = [seen for seen in found if seen.place.startswith(f"layers.{layer}.gate") and seen.what == what]
        by_call: dict[str, list[Seen]] = {}
        for seen in mine:
            by_call.setdefault(seen.graph, []).append(seen)
        ordered = sorted(mine, key=lambda seen: (seen.graph, seen.call))
        assert len(ordered) == 6
        for seen, expected in zip(ordered, outputs[layer], strict=True):
            check(seen, expected)
            assert (seen.value is not None) == (what == "values")
    assert npu_compiler.watched() == []


def watching(function: Callable[..., Any], *places: str, **options: Any) -> Callable[..., Any]:
    npu_compiler.watched()
    return torch.compile(function, backend=AscendBackend(), options={"watch": places, **options})


def log_of(x: Tensor) -> Tensor:
    smaller = x - 1
    logarithm = smaller.log()
    return (logarithm * 0 + smaller).sin()


def test_the_first_place_with_a_nan_is_named() -> None:
    run = watching(log_of, "*:nan")
    good, bad = torch.full((4,), 3.0).npu(), torch.tensor([3.0, 0.5, 2.0, 1.5]).npu()
    for x in (good, good, bad, good, bad):
        run(x)
    found = npu_compiler.watched()
    assert sorted({seen.call for seen in found}) == [2, 4]
    for call in (2, 4):
        first = next(seen for seen in found if seen.call == call)
        assert "smaller.log()" in first.place and (first.nans, first.infinite) == (1, 0)
        assert first.operator == "aten.log.default"
    assert re.search(
        r"test_watched\.py:\d+: .*smaller\.log\(\): aten\.log\.default, float32 \[4\] 1 NaN", str(found[0])
    )


def test_one_of_several_results_is_told_by_its_number_and_its_operator() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.topk(2).values[1] * 2

    run = watching(nn.Sequential(Second()).npu(), "*:nan")
    with torch.inference_mode():
        run(torch.full((4,), torch.nan).npu())
    (first, *_) = npu_compiler.watched()
    assert (first.place[:4], first.operator) == ("0 at", "aten.topk.default[0]")


def test_a_place_that_is_not_there_is_warned_of_once_a_compilation() -> None:
    def run(watch: list[str]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled = torch.compile(
                Model().npu(), backend=AscendBackend(), dynamic=False, options={"watch": watch, "watch_print": False}
            )
            with torch.inference_mode():
                for _ in range(3):
                    compiled(torch.rand(4, 8).npu())
        return [str(entry.message) for entry in caught if entry.category is WatchWarning]

    torch._dynamo.reset()
    (told,) = run(["layers.1.gat:stats", "layers.0.gate:nan", "*:nan"])
    assert told.startswith("watch in graph_0: 'layers.1.gat': nothing is computed there")
    assert "there is 'layers.1.gate'" in told
    torch._dynamo.reset()
    assert len(run(["layers.1.gat:stats", "nowhere.py:3:nan"])) == 2  # one each


def test_infinite_ones_where_they_are_asked_for() -> None:
    run = watching(log_of, "*:inf")
    run(torch.tensor([3.0, 1.0]).npu())
    (first, *_) = npu_compiler.watched()
    assert "smaller.log()" in first.place and (first.nans, first.infinite) == (0, 1)
    run = watching(log_of, "*:nan")
    run(torch.tensor([3.0, 2.0]).npu())
    assert npu_compiler.watched() == []


def scaled(x: Tensor) -> Tensor:
    twice = x * 2
    return twice.sin() + 1


def test_old_calls_make_room_and_odd_values_are_told() -> None:
    line = scaled.__code__.co_firstlineno + 1
    run = watching(scaled, f"test_watched.py:{line}:values", watch_keep=3)
    for number in range(5):
        run(torch.full((2,), float(number)).npu())
    found = npu_compiler.watched()
    assert [seen.call for seen in found] == [2, 3, 4]
    assert [seen.value.tolist() for seen in found if seen.value is not None] == [[4.0, 4.0], [6.0, 6.0], [8.0, 8.0]]
    run(torch.tensor([float("nan"), float("inf")]).npu())
    (odd,) = npu_compiler.watched()
    assert (odd.nans, odd.infinite) == (1, 1) and odd.statistics is not None and odd.statistics.count == 2


def test_a_value_that_is_written_over_is_noted_as_it_was() -> None:
    line = scaled.__code__.co_firstlineno + 1

    def step(x: Tensor, cache: Tensor) -> Tensor:
        kept = scaled(x)
        cache.add_(kept)
        return cache * 1

    run = watching(step, f"test_watched.py:{line}:values")
    cache = torch.zeros(2).npu()
    for number in range(4):
        run(torch.full((2,), float(number)).npu(), cache)
    values = [seen.value for seen in npu_compiler.watched()]
    assert [value.tolist() for value in values if value is not None] == [[2.0 * n, 2.0 * n] for n in range(4)]
