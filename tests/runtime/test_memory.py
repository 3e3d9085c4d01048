"""Device memory, pinned memory and the allocators of torch_npu on the host runtime."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from tests.runtime.program import output_of

npu = torch.npu
GIB = 1 << 30


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


def test_more_than_the_device_has_is_out_of_memory() -> None:
    _, total = npu.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(total + GIB, dtype=torch.uint8, device="npu")
    assert torch.ones(3, device="npu").cpu().tolist() == [1.0] * 3  # the device goes on working


def test_memory_is_accounted_not_reserved() -> None:
    """48 GiB of a 64 GiB device, on whatever machine this is; writing a little of it works."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    npu.empty_cache()
    free, _ = npu.mem_get_info()
    large = torch.zeros(48 * GIB, dtype=torch.uint8, device="npu")
    assert free - npu.mem_get_info()[0] >= 48 * GIB
    large[17 * GIB : 17 * GIB + 4] = 7
    assert large[17 * GIB - 2 : 17 * GIB + 6].cpu().tolist() == [0, 0, 7, 7, 7, 7, 0, 0]
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 512 * 1024
    del large
    npu.empty_cache()


def test_expandable_segments_grow_and_shrink() -> None:
    text = output_of(
        """
        torch.npu.set_device(0)
        free = torch.npu.mem_get_info()[0]
        first = torch.ones(30 << 20, dtype=torch.uint8, device="npu")
        second = torch.full((50 << 20,), 2, dtype=torch.uint8, device="npu")
        segments = torch.npu.memory_snapshot()
        print(any(segment["is_expandable"] for segment in segments))
        total = int(first.sum(dtype=torch.int64).item() + second.sum(dtype=torch.int64).item())
        print(total == (30 << 20) + 2 * (50 << 20))
        del first, second
        torch.npu.empty_cache()
        print(torch.npu.mem_get_info()[0] == free)
        try:
            torch.empty(3 << 30, dtype=torch.uint8, device="npu")
        except torch.OutOfMemoryError as error:
            print("out of memory" in str(error))
        """,
        PYTORCH_NPU_ALLOC_CONF="expandable_segments:True",
        NPU_COMPILER_HOST="hbm=2GiB",
    )
    assert text.splitlines()[-4:] == ["True"] * 4


def test_pinned_memory_is_recognised() -> None:
    pinned = torch.empty(100).pin_memory()
    assert pinned.is_pinned()
    assert not torch.empty(100).is_pinned()
    assert pinned[10:20].is_pinned()


def test_copies_between_devices_and_strides() -> None:
    source = torch.arange(24.0).reshape(4, 6)
    here = source.to("npu:0")
    there = here.to("npu:1")
    assert there.device.index == 1
    assert torch.equal(there.cpu(), source)
    assert torch.equal(here.t().contiguous().cpu(), source.t())
    assert torch.equal(here[:, 1:3].cpu(), source[:, 1:3])
    assert torch.equal(here.to(torch.float16).to("cpu", torch.float32), source)


def test_device_memory_is_not_what_the_host_calls_pinned() -> None:
    runtime = ctypes.CDLL(None)
    device = torch.empty(16, device="npu")

    class Attributes(ctypes.Structure):
        _fields_ = (
            ("id", ctypes.c_uint32),
            ("type", ctypes.c_int),
            ("page_size", ctypes.c_uint32),
            ("reserved", ctypes.c_uint32 * 4),
        )

    kinds = []
    for pointer in (device.data_ptr(), torch.empty(16).pin_memory().data_ptr(), torch.empty(16).data_ptr()):
        attributes = Attributes()
        assert runtime.aclrtPointerGetAttributes(ctypes.c_void_p(pointer), ctypes.byref(attributes)) == 0
        kinds.append(attributes.type)
    assert kinds == [1, 0, 2]  # device, host (registered), unregistered


def test_memory_per_device() -> None:
    free = [npu.mem_get_info(index)[0] for index in range(2)]
    held = torch.empty(GIB, dtype=torch.uint8, device="npu:1")
    assert npu.mem_get_info(0)[0] == free[0]
    assert npu.mem_get_info(1)[0] <= free[1] - GIB
    del held
    npu.empty_cache()
