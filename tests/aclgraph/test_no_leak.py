"""Memory stays where it is over many replays, captures in turn, and resets: what malloc, Python and the device hold."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_model, row_streams
from tests.benchmarks.test_decode_model import SMALL

Step = Callable[[], Any]
TURNS = 3
MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2: sums over all arenas, of all threads."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


@dataclasses.dataclass(frozen=True)
class Held:
    """What the process holds, in bytes (`blocks`: Python's small objects, counted)."""

    malloc: int
    blocks: int
    device: int
    device_used: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        torch.npu.synchronize()
        gc.collect()
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = _MallInfo
        info = mallinfo()
        free, total = torch.npu.mem_get_info()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            malloc=info.uordblks + info.hblkhd,
            blocks=sys.getallocatedblocks(),
            device=torch.npu.memory_stats()["allocated_bytes.all.current"],
            device_used=total - free,
            resident=pages * 4096,
        )

    def beyond(self, other: Held) -> Held:
        return Held(
            *(now - then for now, then in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


def run_often(step: Step, times: int) -> None:
    """A server waits now and then; without that, what is held depends on how far the device lags behind."""
    for done in range(1, times + 1):
        step()
        if done % 20 == 0:
            torch.npu.synchronize()


def grown(step: Step, times: int) -> Held:
    """What is held more after `times` steps, behind half as many (at most 1000) to warm up: the least of some turns.

    A leak takes its share in every turn. A thread that takes its first kernel of a kind from another (any time: it
    depends on who waits for whom) keeps what the libraries below want once for each, 4 MB for MKL's products. What
    the device holds may not grow in any turn.
    """
    run_often(step, min(times // 2, 1000))
    Held.now()  # the first time, asking itself takes memory
    turns = []
    for _ in range(TURNS):
        before = Held.now()
        run_often(step, times)
        turns.append(Held.now().beyond(before))
    return Held(
        malloc=min(turn.malloc for turn in turns),
        blocks=min(turn.blocks for turn in turns),
        device=max(turn.device for turn in turns),
        device_used=max(turn.device_used for turn in turns),
        resident=min(turn.resident for turn in turns),
    )


def decode_step() -> Step:
    """A decode step, captured."""
    model = decode_model.decoder(SMALL).to("npu")
    run = torch.compile(model, backend="ascend", fullgraph=True, dynamic=False)
    tokens, position = (argument.to("npu") for argument in decode_model.inputs(SMALL))
    return lambda: run(tokens, position)


def two_streams() -> Step:
    """Blocks captured on two streams, which run side by side."""
    return row_streams.compiled(row_streams.WAYS["two streams"])


STEPS = {"decode step": decode_step, "two streams": two_streams}


def check_flat(found: Held, times: int) -> None:
    """Nothing on the device, and less of malloc and Python than a thing a hundred replays would take."""
    assert found.device <= 0 and found.device_used <= 0, found
    assert found.blocks < 200 + times // 100, found
    assert found.malloc < (16 << 10) + times // 4, found
    assert found.resident < (1 << 20) + times * 8, found


@pytest.mark.parametrize("name", STEPS)
@torch.inference_mode()
def test_replays_hold_no_more_each_time(name: str) -> None:
    step = STEPS[name]()
    times = 2000 if name == "decode step" else 500
    check_flat(grown(step, times), times)


@pytest.mark.full
@pytest.mark.parametrize(("name", "times"), [("decode step", 100_000 // TURNS), ("two streams", 20_000 // TURNS)])
@torch.inference_mode()
def test_a_hundred_thousand_replays_hold_no_more(name: str, times: int) -> None:
    found = grown(STEPS[name](), times)
    check_flat(found, times)
    assert found.resident < 2 << 20, found


@torch.inference_mode()
def test_a_small_leak_would_be_seen() -> None:
    step = STEPS["decode step"]()
    kept = []
    allocate = ctypes.CDLL(None).malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)

    def leaking() -> None:
        step()
        kept.append(allocate(24))

    found = grown(leaking, 2000)
    for address in kept:
        ctypes.CDLL(None).free(ctypes.c_void_p(address))
    with pytest.raises(AssertionError):
        check_flat(dataclasses.replace(found, blocks=0, resident=0), 2000)


@torch.inference_mode()
def test_captures_in_turn_hold_no_more() -> None:
    """Two sizes with room for one: each call drives the other's graph out and captures."""
    run = torch.compile(
        lambda x, w: torch.relu(x @ w) @ w, backend="ascend", dynamic=True, options={"capture_limit": 1}
    )
    weight = torch.rand(16, 16, device="npu")
    rows = [torch.rand(size, 16, device="npu") for size in (3, 5)]

    def step() -> None:
        for x in rows:
            run(x, weight)

    found = grown(step, 40)
    assert found.device <= 0 and found.device_used <= 0, found
    # The ledger has a line for each capture.
    assert found.malloc < 40 * 8192, found
    assert found.resident < 4 << 20, found


def test_graphs_that_are_reset_hold_nothing() -> None:
    x = torch.zeros(16, device="npu")

    def step() -> None:
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            for _ in range(20):
                x.add_(1)
        graph.replay()
        graph.reset()

    found = grown(step, 100)
    assert found.device <= 0 and found.device_used <= 0, found
    assert found.malloc < 100 * 64, found
    assert found.resident < 1 << 20, found
