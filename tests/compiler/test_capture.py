"""Captured graphs give what eager PyTorch gives on the CPU, call after call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.aclgraph.ledger import Ledger
from npu_compiler.backend import AscendBackend


class Compiled:
    """A function compiled by a backend of its own, with what its graphs went through."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.backend = AscendBackend()
        backend = self.backend if options is None else lambda gm, ex: self.backend(gm, ex, options=options)
        self.run = torch.compile(function, backend=backend, **kwargs)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    @property
    def ledger(self) -> Ledger:
        (graph,) = self.backend.compiled()
        assert graph.ledger is not None
        return graph.ledger


def to_npu(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("npu") if isinstance(leaf, Tensor) else leaf, value)


def assert_same(got: Any, expected: Any) -> None:
    left, right = tree_leaves(got), tree_leaves(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(b, Tensor):
            assert a.device.type == "npu"
            torch.testing.assert_close(a.cpu(), b)
        else:
            assert a == b


def rows(key: str) -> str:
    """The first size of a ledger's key, such as "3" of "s0=3, s1=2"."""
    return key.split(",")[0].partition("=")[2]


def check(function: Callable[..., Any], calls: list[tuple[Any, ...]], **kwargs: Any) -> Compiled:
    """Runs every call compiled on the device and eagerly on the CPU; results and mutated arguments must agree."""
    compiled = Compiled(function, **kwargs)
    for args in calls:
        on_device = to_npu(args)
        assert_same(compiled(*on_device), function(*args))
        assert_same(on_device, args)
    return compiled


def test_static_shape_is_captured_once_and_replayed() -> None:
    compiled = check(
        lambda x, y: (torch.cos(x) + y * 2, x.sum(-1)),
        [(torch.rand(4, 8), torch.rand(4, 8)) for _ in range(4)],
        dynamic=False,
    )
    assert [entry.key for entry in compiled.ledger.captures] == ["static"]
    assert compiled.ledger.replays == 3
    assert compiled.ledger.captures[0].calls == 4
    assert compiled.ledger.captures[0].milliseconds > 0


def test_dynamic_shapes_have_a_graph_each() -> None:
    sizes = [3, 5, 3, 7, 5, 3]
    compiled = check(lambda x: x @ x.transpose(0, 1) + x.shape[0], [(torch.rand(n, 8),) for n in sizes], dynamic=True)
    assert len(compiled.ledger.captures) == 3
    assert compiled.ledger.replays == 3
    name = compiled.ledger.captures[0].key.split("=")[0]
    assert [entry.reason.split(",")[0] for entry in compiled.ledger.captures] == [
        "first shape",
        f"new shape: {name} 3 -> 5",
        f"new shape: {name} 5 -> 7",
    ]


def test_least_recently_used_graph_is_evicted() -> None:
    sizes = [3, 4, 3, 5, 3, 4]
    compiled = check(
        lambda x: x * x.shape[0], [(torch.rand(n, 2),) for n in sizes], dynamic=True, options={"capture_limit": 2}
    )
    ledger = compiled.ledger
    # 4 goes when 5 comes (3 was used later), 5 goes when 4 comes back
    assert [rows(entry.key) for entry in ledger.captures] == ["3", "4", "5", "4"]
    assert [rows(key) for key in ledger.evicted] == ["4", "5"]
    assert ledger.replays == 2
    assert ledger.captures[-1].reason == "called again after its graph was driven out: capture_limit=2"


def test_only_listed_sizes_are_captured() -> None:
    compiled = check(
        lambda x: x + 1, [(torch.rand(n, 2),) for n in (4, 5, 4, 5)], dynamic=True, options={"capture_sizes": [2, 4]}
    )
    assert [rows(entry.key) for entry in compiled.ledger.captures] == ["4"]
    assert compiled.ledger.uncaptured["a size is not in capture_sizes"] == 2


def test_outputs_survive_the_next_call() -> None:
    compiled = Compiled(lambda x: x + 1, dynamic=False)
    results = [compiled(torch.full((4,), float(i), device="npu")) for i in range(4)]
    for i, result in enumerate(results):
        assert torch.equal(result.cpu(), torch.full((4,), i + 1.0))


def test_aliased_outputs_stay_aliased() -> None:
    compiled = Compiled(lambda x: (lambda y: (y, y[1], y.view(-1)))(x + 1), dynamic=False)
    for _ in range(3):
        whole, row, flat = compiled(torch.zeros(2, 3, device="npu"))
        row.fill_(7.0)
        assert whole.cpu()[1].tolist() == [7.0, 7.0, 7.0]
        assert flat.cpu().tolist() == [1.0, 1.0, 1.0, 7.0, 7.0, 7.0]


def test_outputs_that_are_inputs_or_views_of_them() -> None:
    compiled = Compiled(lambda x: (x, x[1:], x.t(), x * 2), dynamic=False)
    for _ in range(3):
        x = torch.rand(3, 3).npu()
        same, rows, turned, double = compiled(x)
        assert same is x
        assert rows.data_ptr() == x[1:].data_ptr()
        x.fill_(5.0)
        assert turned.cpu().eq(5.0).all()
        assert not double.cpu().eq(10.0).all()


def test_expanded_and_strided_inputs() -> None:
    base = torch.rand(4, 6)
    check(
        lambda x, y: (x + y, x.mean()),
        [(base[:, ::2], torch.rand(1, 3).expand(4, 3)), (base[:, ::2] + 0, torch.rand(1, 3).expand(4, 3))] * 2,
    )


def test_repeated_integer_and_empty_arguments() -> None:
    x = torch.randint(0, 10, (4,))
    check(lambda a, b, index: (a * b, a[index], a[:0]), [(x, x, torch.tensor([1, 3]))] * 3, dynamic=False)


def test_output_without_inputs() -> None:
    compiled = Compiled(lambda: torch.arange(6, device="npu").view(2, 3) * 2, dynamic=False)
    for _ in range(3):
        assert compiled().cpu().tolist() == [[0, 2, 4], [6, 8, 10]]
    assert compiled.ledger.replays == 2


def test_sizes_come_back_as_numbers() -> None:
    check(lambda x: (x.shape[0] * 2, x + x.shape[0], None), [(torch.rand(n, 3),) for n in (2, 5, 2, 5)], dynamic=True)


def test_graph_break() -> None:
    def broken(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    compiled = Compiled(broken, dynamic=False)
    for _ in range(3):
        x = torch.rand(4)
        assert_same(compiled(x.npu()), broken(x))
    assert len(compiled.backend.compiled()) == 2


class Cached(torch.nn.Module):
    """A linear layer with a buffer it writes, as a KV cache is written."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(8, 4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.cache[position] = self.linear(x)
        return self.cache.sum(0)


def test_module_with_a_written_buffer() -> None:
    reference = Cached()
    module = Cached()
    module.load_state_dict(reference.state_dict())
    module = module.to("npu")
    compiled = Compiled(module, dynamic=False)
    for step in range(4):
        x, position = torch.rand(1, 4), torch.tensor([step])
        assert_same(compiled(x.npu(), position.npu()), reference(x, position))
        torch.testing.assert_close(module.cache.cpu(), reference.cache)
    assert len(compiled.ledger.captures) == 1
    (graph,) = compiled.backend.compiled()
    assert graph.graph is not None
    assert "aten.clone" not in str(graph.graph.graph), "the buffer must be written in place, not cloned"


def test_written_input_at_one_address_is_not_copied() -> None:
    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return cache * 2

    compiled = Compiled(step, dynamic=False)
    cache, expected = torch.zeros(4, device="npu"), torch.zeros(4)
    for _ in range(4):
        x = torch.rand(4)
        assert_same(compiled(cache, x.npu()), step(expected, x))
        torch.testing.assert_close(cache.cpu(), expected)
    assert len(compiled.ledger.captures) == 1


def test_written_input_that_moves_is_copied_after_two_recaptures() -> None:
    def step(x: Tensor) -> Tensor:
        x.mul_(3)
        return x + 1

    compiled = Compiled(step, dynamic=False)
    kept = []  # alive, so that no address comes twice
    for i in range(6):
        x = torch.full((4,), float(i))
        kept.append(x.npu())
        assert_same(compiled(kept[-1]), step(x))
        torch.testing.assert_close(kept[-1].cpu(), x)
    reasons = [entry.reason for entry in compiled.ledger.captures]
    assert len(reasons) == 3
    assert reasons[1].startswith("moved in memory: x")
    assert reasons[2].endswith("it is copied in and back from now on")
    assert compiled.ledger.replays == 3


def test_written_input_that_moves_rarely_is_never_copied() -> None:
    """A KV cache that a generation allocates anew, and every token writes: a capture a generation, no copies."""

    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return cache * 2

    compiled = Compiled(step, dynamic=False)
    kept = []
    for _ in range(4):
        expected = torch.zeros(4)
        kept.append(expected.npu())
        for _ in range(6):
            x = torch.rand(4)
            assert_same(compiled(kept[-1], x.npu()), step(expected, x))
        torch.testing.assert_close(kept[-1].cpu(), expected)
    addresses = [f"{cache.data_ptr():#x}" for cache in kept]
    assert [entry.reason for entry in compiled.ledger.captures[1:]] == [
        f"moved in memory: cache {before} -> {after}" for before, after in pairwise(addresses)
    ]


def test_number_that_no_operator_reads_is_not_in_the_key() -> None:
    """A count that the model keeps in Python (transformers' sliding window cache) and that only numbers come from."""

    class Counter:
        tokens = 3

    def step(counter: Counter, x: Tensor) -> tuple[Tensor, int]:
        counter.tokens += 2
        return x + x.shape[0], counter.tokens * 3

    counter, expected = Counter(), Counter()
    compiled = Compiled(step)
    for size in (2, 2, 2, 2, 4, 4, 2):
        x = torch.rand(size, 3)
        assert_same(compiled(counter, x.npu()), step(expected, x))
        assert counter.tokens == expected.tokens
    # dynamo's graphs: two with everything static, one with tokens dynamic, one with the rows dynamic too
    ledgers = [graph.ledger for graph in compiled.backend.compiled() if graph.ledger]
    assert [[rows(entry.key) for entry in ledger.captures] for ledger in ledgers] == [[""], [""], [""], ["4", "2"]]


def test_number_that_an_operator_reads_is_in_the_key() -> None:
    sizes = (2, 5, 2, 7, 5)
    compiled = Compiled(lambda x, count: (x * count, count + 1))
    for size in sizes:
        x = torch.rand(3)
        assert_same(compiled(x.npu(), size), (x * size, size + 1))
    assert sum(len(graph.ledger.captures) for graph in compiled.backend.compiled() if graph.ledger) == 4


def test_parameter_that_is_replaced_is_noticed() -> None:
    reference = torch.nn.Linear(4, 4)
    module = torch.nn.Linear(4, 4).to("npu")
    module.load_state_dict(reference.state_dict())
    compiled = Compiled(module, dynamic=False)
    x = torch.rand(2, 4)
    for _ in range(2):
        assert_same(compiled(x.npu()), reference(x))
    new = torch.rand(4, 4)
    reference.weight.data = new
    module.weight.data = new.npu()
    for _ in range(2):
        assert_same(compiled(x.npu()), reference(x))
    assert "weight" in compiled.ledger.captures[-1].reason


def test_random_numbers_follow_the_generator() -> None:
    compiled = Compiled(lambda x: x + torch.rand_like(x), dynamic=False)
    x = torch.zeros(64, device="npu")
    compiled(x)
    torch.npu.manual_seed(7)
    first, second = compiled(x).cpu(), compiled(x).cpu()
    assert not torch.equal(first, second)
    torch.npu.manual_seed(7)
    assert torch.equal(compiled(x).cpu(), first)
    assert compiled.ledger.replays == 3


def test_calls_from_another_stream_wait_for_the_last() -> None:
    compiled = Compiled(lambda x: x * 2 + 1, dynamic=False)
    side = torch.npu.Stream()
    for i in range(6):
        x = torch.full((1024,), float(i), device="npu")
        torch.npu.synchronize()
        with torch.npu.stream(side if i % 2 else torch.npu.default_stream()):
            result = compiled(x)
            torch.npu.current_stream().synchronize()
        assert result.cpu()[0] == i * 2 + 1


def test_uncaptured_by_option() -> None:
    compiled = check(lambda x: x + 1, [(torch.rand(3),)] * 2, options={"capture": False}, dynamic=False)
    assert compiled.ledger.uncaptured == {"capture is off": 2}
    assert not compiled.ledger.captures


def test_cpu_graph_is_called_as_it_is() -> None:
    compiled = Compiled(lambda x: x.sin() + 1, dynamic=False)
    x = torch.rand(4)
    torch.testing.assert_close(compiled(x), x.sin() + 1)
    assert compiled.ledger.uncaptured == {"no tensor on an npu device": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_memory_on_request_refuses_stale_outputs(dtype: torch.dtype) -> None:
    from npu_compiler.errors import StaleOutputError

    compiled = Compiled(lambda x: x + 1, options={"clone_outputs": False}, dynamic=False)
    x = torch.ones(4, device="npu", dtype=dtype)
    compiled(x)
    result = compiled(x)
    assert result.cpu().eq(2).all()
    view = result[1:]
    del result
    with pytest.raises(StaleOutputError, match="output 0 of an earlier call is still in use"):
        compiled(x)
    del view
    assert compiled(x).cpu().eq(2).all()


def test_nothing_but_views() -> None:
    compiled = Compiled(lambda x: (x.view(-1), x.shape[0]), dynamic=False)
    x = torch.rand(2, 3).npu()
    for _ in range(2):
        flat, rows = compiled(x)
        assert flat.data_ptr() == x.data_ptr()
        assert rows == 2


def test_inference_mode_and_no_grad_may_alternate() -> None:
    compiled = Compiled(lambda x: x * 2, dynamic=False)
    for i in range(4):
        x = torch.full((3,), float(i)).npu()
        with torch.inference_mode(i % 2 == 0):
            assert compiled(x).cpu().tolist() == [2.0 * i] * 3


def test_device_that_is_not_the_current_one() -> None:
    compiled = Compiled(lambda x: x * 2 + 1, dynamic=False)
    for i in range(3):
        result = compiled(torch.full((3,), float(i)).to("npu:1"))
        assert result.device == torch.device("npu:1")
        assert result.cpu().tolist() == [2.0 * i + 1] * 3
    assert compiled.ledger.replays == 2
    assert torch.npu.current_device() == 0
