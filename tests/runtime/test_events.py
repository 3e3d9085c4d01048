"""torch.npu's events on the host runtime."""

from __future__ import annotations

import time

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.runtime.program import output_of

npu = torch.npu


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


def test_query_and_synchronize() -> None:
    stream, event = npu.Stream(), npu.Event()
    gate = torch.zeros(4 << 20, device="npu")
    npu.synchronize()
    with npu.stream(stream):
        for _ in range(30):
            gate.add_(1)
        event.record(stream)
    event.synchronize()
    assert event.query()
    assert torch.equal(gate.cpu(), torch.full((4 << 20,), 30.0))


def test_elapsed_time_measures_the_work_between() -> None:
    begin, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    value = torch.zeros(4 << 20, device="npu")
    npu.synchronize()
    started = time.perf_counter()
    begin.record()
    for _ in range(10):
        value.add_(1)
    end.record()
    npu.synchronize()
    wall = (time.perf_counter() - started) * 1e3
    measured = begin.elapsed_time(end)
    assert 0 < measured <= wall


def test_events_without_timing_tell_no_time() -> None:
    begin, end = npu.Event(), npu.Event()
    begin.record()
    end.record()
    npu.synchronize()
    with pytest.raises(RuntimeError, match="enable_timing=True"):
        begin.elapsed_time(end)


def test_a_wait_is_for_the_record_before_it() -> None:
    first, second, event = npu.Stream(), npu.Stream(), npu.Event()
    value = torch.zeros(1 << 16, device="npu")
    npu.synchronize()
    for _ in range(10):
        with npu.stream(first):
            value.add_(1)
            event.record(first)
        event.wait(second)
        with npu.stream(second):
            value.mul_(2)
            event.record(second)
        event.wait(first)
    npu.synchronize()
    expected = 0.0
    for _ in range(10):
        expected = (expected + 1) * 2
    assert value[0].item() == expected


def test_external_events_hold_a_stream_until_another_records() -> None:
    waiting, other = npu.Stream(), npu.Stream()
    event = npu.ExternalEvent()
    value = torch.zeros(16, device="npu")
    npu.synchronize()
    with npu.stream(waiting):
        event.wait(waiting)
        event.reset(waiting)
        value.add_(1)
    time.sleep(0.05)
    assert not waiting.query()
    event.record(other)
    waiting.synchronize()
    assert value.cpu().tolist() == [1.0] * 16


def _use_shared(tensors: multiprocessing.Queue, answers: multiprocessing.Queue) -> None:
    import torch_npu  # noqa: F401

    torch.npu.set_device(0)
    tensor = tensors.get()
    answers.put(tensor.cpu().tolist())
    tensor.mul_(10)
    torch.npu.synchronize()
    answers.put("multiplied")
    tensors.get()


@pytest.mark.parametrize("allocator", ["expandable_segments:False", "expandable_segments:True"])
def test_processes_share_device_memory(allocator: str) -> None:
    source = """
        import torch.multiprocessing as multiprocessing
        from tests.runtime.test_events import _use_shared

        if __name__ == "__main__":
            torch.npu.set_device(0)
            context = multiprocessing.get_context("spawn")
            tensors, answers = context.Queue(), context.Queue()
            process = context.Process(target=_use_shared, args=(tensors, answers))
            process.start()
            tensor = torch.arange(5.0).npu()
            tensors.put(tensor)
            print(answers.get(timeout=120), answers.get(timeout=120), tensor.cpu().tolist())
            tensors.put(None)
            process.join()
        """
    text = output_of(source, PYTORCH_NPU_ALLOC_CONF=allocator)
    assert text.splitlines()[-1] == "[0.0, 1.0, 2.0, 3.0, 4.0] multiplied [0.0, 10.0, 20.0, 30.0, 40.0]"
