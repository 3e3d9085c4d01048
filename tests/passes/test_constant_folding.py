"""constant_folding: what is the same at every call is computed once, and anew when a weight changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_compiler.backend import AscendBackend, CompiledGraph
from npu_compiler.config import Options
from npu_compiler.passes import constant_folding, pipeline
from npu_compiler.passes.constant_folding import KEPT_BYTES
from npu_compiler.passes.record import Pass, PassRecord
from tests.passes.lowered import apply, calls, lowered

PASS = Pass(constant_folding.NAME, "", constant_folding.run)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(function: Any, **options: Any) -> tuple[Any, AscendBackend]:
    backend = AscendBackend()
    return torch.compile(function, backend=backend, fullgraph=True, options=options), backend


def only(backend: AscendBackend) -> CompiledGraph:
    (graph,) = backend.compiled()
    return graph


def folded(function: Any, *args: Any) -> PassRecord:
    """What the pass does to the lowered program."""
    return apply(PASS, lowered(function, *args).graph)


def steps(x: Tensor) -> Tensor:
    return x * (torch.arange(8, device=x.device) * 0.5 + 1)


def test_arithmetic_on_constants_leaves_the_program() -> None:
    """Before: arange, mul, add, mul. After: mul."""
    run, backend = compiled(steps)
    for _ in range(3):
        x = torch.randn(4, 8)
        torch.testing.assert_close(run(x.npu()).cpu(), steps(x))
    graph = only(backend)
    assert graph.graph is not None
    assert calls(graph.graph) == ["aten.mul.Tensor"]
    assert graph.constants is not None
    assert (len(graph.constants.values), graph.constants.size) == (1, 32)
    assert graph.ledger is not None
    assert graph.ledger.replays == 2
    assert "fired constant_folding: aten.add.Tensor (3 nodes, saves 3 kernels" in str(graph)
    assert "constants: 1 computed once, 32 B" in str(graph)


def test_a_constant_from_host_memory_no_longer_bars_the_capture() -> None:
    """torch.tensor on a device is a copy from the host, which a captured graph can't make."""

    def program(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)

    run, backend = compiled(program)
    for _ in range(3):
        x = torch.randn(4, 3)
        torch.testing.assert_close(run(x.npu()).cpu(), program(x))
    ledger = only(backend).ledger
    assert ledger is not None
    assert ledger.replays == 2


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.arange(4) * 2
    return x + ones, ones


def large(x: Tensor) -> Tensor:
    return x + torch.ones(4, KEPT_BYTES) * 2


def drawn(x: Tensor) -> Tensor:
    return x + torch.rand(4) * 2


def by_size(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0])[:, None] * 2


def parameter(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.exp()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (returned, "the caller gets mul, and may write it"),
        (large, f"mul would keep {16 * KEPT_BYTES} bytes, allowed are {KEPT_BYTES}"),
        (drawn, ""),
    ],
)
def test_near_misses(program: Any, reason: str) -> None:
    record = folded(program, torch.randn(4, 1))
    assert not [fired for fired in record.fired if "mul" in fired.rule]
    assert reason in "".join(refused.reason for refused in record.refused)
    assert reason or not record.fired


def test_what_depends_on_an_input_or_a_size_is_no_constant() -> None:
    x = torch.randn(5, 3)
    torch._dynamo.mark_dynamic(x, 0)
    program = lowered(by_size, x, dynamic=None).graph
    assert not apply(PASS, program).fired
    assert not folded(parameter, torch.randn(3), torch.randn(3)).fired


def test_a_written_constant_is_made_anew() -> None:
    """A cache that starts at zero: reinplace writes into it."""

    def program(x: Tensor, at: Tensor) -> Tensor:
        cache = torch.zeros(8, 4)
        cache[at] = x
        return cache.sum(0)

    module = lowered(program, torch.randn(2, 4), torch.tensor([1, 2])).graph
    records = {record.name: record for record in pipeline.run(module, Options())}
    assert records["reinplace"].fired
    assert not records[constant_folding.NAME].fired


def test_the_compressed_causal_mask_is_kept() -> None:
    """What torch_npu's attention with `is_causal` makes at every call."""

    def program(x: Tensor) -> Tensor:
        later = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        return x.masked_fill(later, 0.0)

    record = folded(program, torch.randn(2048, 2048))
    assert [fired.rule for fired in record.fired] == ["constant_folding: aten.triu.default"]


def test_the_last_value_that_may_be_kept_is_kept() -> None:
    """An expanded tensor is a view, and its sum with something else too large: what it is made from is kept."""

    def program(x: Tensor) -> Tensor:
        row = torch.arange(2048, dtype=torch.float32).exp()
        return x + (row.expand(2048, 2048) + row[:, None])

    record = folded(program, torch.randn(2048, 2048))
    assert [fired.rule for fired in record.fired] == ["constant_folding: aten.exp.default"]
    assert ["would keep 16777216 bytes" in refused.reason for refused in record.refused] == [True]


class Decay(nn.Module):
    """The state matrix of a state-space model, which is stored as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * -torch.exp(self.logarithm.float())


def test_weights_count_as_constants_only_where_frozen() -> None:
    model, x = Decay().npu(), torch.randn(4, 16).npu()
    for freeze, left in ((False, 3), (True, 1)):
        torch._dynamo.reset()
        run, backend = compiled(model, freeze=freeze)
        for _ in range(3):
            torch.testing.assert_close(run(x), model(x))
        program = only(backend).graph
        assert program is not None
        assert len(calls(program)) == left


def test_a_changed_weight_changes_the_constants() -> None:
    """Written in place, replaced, loaded; and captured graphs go on reading the same memory."""
    model, x = Decay().npu(), torch.randn(4, 16).npu()
    run, backend = compiled(model, freeze=True)

    def check() -> None:
        for _ in range(2):
            torch.testing.assert_close(run(x), model(x))

    check()
    model.logarithm.mul_(2)
    check()
    model.load_state_dict({"logarithm": torch.rand(16)})
    check()
    with torch.inference_mode():
        model.logarithm.add_(1)
    check()
    ledger = only(backend).ledger
    assert ledger is not None
    assert len(ledger.captures) == 1
    model.logarithm = nn.Parameter(torch.rand(16).npu())
    check()


def test_a_stored_program_computes_its_constants_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_COMPILER_CACHE", str(tmp_path))
    model, x = Decay().npu(), torch.randn(4, 16).npu()
    for stored in ("stored", "from the cache"):
        torch._dynamo.reset()
        run, backend = compiled(model, freeze=True, cache=True)
        for _ in range(3):
            torch.testing.assert_close(run(x), model(x))
        graph = only(backend)
        assert graph.stored == stored
        assert graph.constants is not None
        model.logarithm.neg_()


def test_a_weight_that_counts_no_writes_is_read_at_every_call() -> None:
    with torch.inference_mode():
        model, x = Decay().npu(), torch.randn(4, 16).npu()
        run, _ = compiled(model, freeze=True)
        for _ in range(3):
            model.logarithm.mul_(1.5)
            torch.testing.assert_close(run(x), model(x))


def test_a_written_buffer_is_no_constant() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count.exp()

    model, x = Counts().npu(), torch.randn(4).npu()
    run, _ = compiled(model, freeze=True)
    for count in (1, 2, 3):
        torch.testing.assert_close(run(x), x + torch.full_like(x, count).exp())


def test_inside_a_capture_of_the_users_own() -> None:
    """Values computed while another graph is captured are that graph's: they are not kept."""
    x = torch.randn(4, 8).npu()
    run, _ = compiled(steps, capture=False)
    torch._dynamo.reset()
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    stream.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(stream):
        torch.compile(steps, backend="eager")(x)
        graph.capture_begin()
        inside = run(x)
        graph.capture_end()
    for _ in range(2):
        x.copy_(torch.randn(4, 8))
        graph.replay()
        torch.npu.synchronize()
        torch.testing.assert_close(inside.cpu(), steps(x.cpu()))
        torch.testing.assert_close(run(x).cpu(), steps(x.cpu()))


def test_another_stream_and_another_thread_read_finished_values() -> None:
    """The first call comes from a thread with a stream of its own, the next from here."""
    run, backend = compiled(steps)
    x = torch.randn(4, 8)

    def first() -> None:
        with torch.no_grad(), torch.npu.stream(torch.npu.Stream()):
            results.append(run(x.npu()).cpu())

    results: list[Tensor] = []
    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    for _ in range(2):
        results.append(run(x.npu()).cpu())
    for result in results:
        torch.testing.assert_close(result, steps(x))
    assert only(backend).constants is not None
