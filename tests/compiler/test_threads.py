"""Compiled functions called from several threads: each thread gets its own results, one graph at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from npu_compiler.backend import AscendBackend

THREADS, CALLS = 4, 25


def in_threads(work: Callable[[int], None]) -> None:
    """Runs `work(index)` in every thread, all started together; the first failure is raised."""
    start = threading.Barrier(THREADS)

    def started(index: int) -> None:
        start.wait()
        with torch.no_grad():  # grad mode is a thread's own
            work(index)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(started, range(THREADS)))


def served(backend: AscendBackend) -> int:
    """How many calls were served; no graph was captured twice for one shape."""
    calls = 0
    for graph in backend.compiled():
        assert graph.ledger is not None
        keys = [entry.key for entry in graph.ledger.captures]
        assert len(keys) == len(set(keys))
        calls += len(keys) + graph.ledger.replays
    return calls


def product(x: Tensor) -> Tensor:
    return x @ x + 1


def wave(x: Tensor) -> Tensor:
    return torch.cos(x) * 2


def test_one_function_from_several_threads_on_one_stream() -> None:
    backend = AscendBackend()
    compiled = torch.compile(product, backend=backend, dynamic=False)

    def work(index: int) -> None:
        for call in range(CALLS):
            x = torch.full((16, 16), float(index * 100 + call))
            assert torch.equal(compiled(x.npu()).cpu(), product(x)), f"thread {index}, call {call}"

    in_threads(work)
    assert served(backend) == THREADS * CALLS  # threads that start together may compile a graph each


def test_two_functions_many_shapes_a_stream_each() -> None:
    """Captures of one thread meet captures, replays, copies and waits of the others."""
    backend = AscendBackend()
    pairs = [(torch.compile(f, backend=backend, dynamic=True), f) for f in (product, wave)]

    def work(index: int) -> None:
        stream = torch.npu.Stream()
        with torch.npu.stream(stream):
            for call in range(CALLS):
                size = 8 + (call * 7 + index) % 6
                x = torch.full((size, size), float(index + call / 8))
                compiled, function = pairs[(call + index) % 2]
                result = compiled(x.npu())
                stream.synchronize()
                torch.testing.assert_close(result.cpu(), function(x))

    in_threads(work)
    assert served(backend) == THREADS * CALLS


def test_replays_that_write_one_tensor_do_not_mix() -> None:
    """As many additions as calls. The first two calls come from one thread: several graphs, and calls that run operator
    by operator, may mix what they read and write, as eager code does."""
    total = torch.zeros(64, device="npu")
    compiled = torch.compile(lambda state, x: state.add_(x), backend=AscendBackend(), dynamic=False)
    ones = torch.ones(64, device="npu")
    for _ in range(2):
        compiled(total, ones)

    def work(index: int) -> None:
        for _ in range(CALLS):
            compiled(total, torch.ones(64, device="npu"))

    in_threads(work)
    torch.npu.synchronize()
    assert total.cpu().tolist() == [2.0 + THREADS * CALLS] * 64


def test_backward_runs_in_autograds_thread() -> None:
    """Under grad the backward runs in a thread of autograd's own; a captured graph is called from this one."""
    weight = torch.rand(4, 4, device="npu", requires_grad=True)
    with torch.enable_grad():
        loss = torch.compile(lambda x: (x @ weight).sum(), backend=AscendBackend())
        x = torch.rand(3, 4, device="npu")
        loss(x).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.cpu(), x.cpu().sum(0).unsqueeze(1).expand(4, 4))
