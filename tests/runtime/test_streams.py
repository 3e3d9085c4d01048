"""torch.npu's streams on the host runtime."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npu_compiler.runtime import counters
from tests.runtime.program import output_of, run_program

npu = torch.npu


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


def test_work_runs_in_order_on_each_stream() -> None:
    source = torch.arange(1000.0).pin_memory()
    target = torch.empty(1000, device="npu")
    back = torch.empty(1000).pin_memory()
    stream = npu.Stream()
    with npu.stream(stream):
        for _ in range(50):
            target.copy_(source, non_blocking=True)
            target.add_(1)
            back.copy_(target, non_blocking=True)
    stream.synchronize()
    assert stream.query()
    assert torch.equal(back, source + 1)


def test_streams_wait_for_each_other() -> None:
    first, second = npu.Stream(), npu.Stream()
    value = torch.zeros(1 << 16, device="npu")
    npu.synchronize()
    for _ in range(20):
        with npu.stream(first):
            value.add_(1)
        second.wait_stream(first)
        with npu.stream(second):
            value.mul_(2)
        first.wait_stream(second)
    npu.synchronize()
    expected = 0.0
    for _ in range(20):
        expected = (expected + 1) * 2
    assert torch.equal(value.cpu(), torch.full((1 << 16,), expected))


def test_pinned_copies_do_not_wait_and_pageable_ones_do() -> None:
    target = torch.empty(4096, device="npu")
    pinned, pageable = torch.ones(4096).pin_memory(), torch.ones(4096)
    npu.synchronize()
    before = counters.read()
    target.copy_(pinned, non_blocking=True)
    npu.current_stream().query()  # drains torch_npu's own queue of tasks; counts none of the runtime's waits
    grown = counters.difference(before)
    assert grown["host_synchronizations"] == 0
    assert grown["tasks"] >= 1
    npu.synchronize()
    before = counters.read()
    target.copy_(pageable, non_blocking=True)
    npu.synchronize()
    assert counters.difference(before)["host_synchronizations"] >= 2


def test_streams_belong_to_devices() -> None:
    assert npu.Stream(device=3, priority=-1).device_index == 3
    with npu.device(2):
        assert npu.current_stream().device_index == 2
        other = torch.ones(4, device="npu")
    assert other.device.index == 2
    assert (other.to("npu:0") + 1).cpu().tolist() == [2.0] * 4


def test_a_failed_task_is_named_and_stays_an_error() -> None:
    # An index out of range fails on the stream's thread, long after the call returned.
    result = run_program(
        """
        torch.npu.set_device(0)
        table = torch.zeros(4, 4, device="npu")
        out = torch.nn.functional.embedding(torch.tensor([1, 999]).npu(), table)
        for _ in range(2):
            try:
                torch.npu.synchronize()
                print("silence")
            except RuntimeError as error:
                print("507015" in str(error) and "aclnnEmbedding" in str(error))
        """
    )
    assert result.stdout.split()[-2:] == ["True", "True"], result.stdout + result.stderr


def test_settings_choose_devices_and_chip() -> None:
    text = output_of(
        "npu = torch.npu; npu.set_device(1); print(npu.device_count(), npu.get_device_name(1), npu.mem_get_info()[1])",
        NPU_COMPILER_HOST="devices=2,soc=Ascend910B2,hbm=1GiB",
    )
    assert text.splitlines()[-1] == f"2 Ascend910B2 {1 << 30}"


@pytest.mark.parametrize("mode", ["0", "1", "2"])
def test_all_modes_of_the_task_queue_work(mode: str) -> None:
    source = """
        torch.npu.set_device(0)
        x = torch.arange(6.0).npu()
        for _ in range(100):
            x = x * 1.5 - x * 0.5
        print(x.cpu().tolist())
        """
    assert (
        output_of(source, TASK_QUEUE_ENABLE=mode, ASCEND_LAUNCH_BLOCKING="1" if mode == "0" else "0").splitlines()[-1]
        == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"
    )


def test_products_use_as_many_threads_as_asked_for() -> None:
    """ATen's blocked products run on a stream's thread, which is none of ATen's own."""
    program = """
    import os
    torch.set_num_threads(1)
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        x, weight = torch.randn(512, 512, device="npu"), torch.randn(512, 512, device="npu")
        stream.synchronize()
        before = set(os.listdir("/proc/self/task"))
        product = x @ weight
        stream.synchronize()
    print(len(set(os.listdir("/proc/self/task")) - before))
    """
    assert output_of(program, OMP_NUM_THREADS="2").splitlines()[-1] == "0"


def test_tasks_on_a_waiting_thread_see_none_of_its_modes() -> None:
    """A thread that waits for a stream runs tasks of it; the modes that the program put there are not for them."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    values = torch.rand(64, device="npu")
    expected = values.cpu().cumprod(0)
    with Seen():
        for _ in range(30):
            time.sleep(0.003)  # the stream's own thread sleeps by then
            found = torch.cumprod(values, 0)
            torch.npu.synchronize()
    assert set(seen) == {"aten.cumprod.default"}
    torch.testing.assert_close(found.cpu(), expected)
