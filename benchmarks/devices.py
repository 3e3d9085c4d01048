"""What the rows share about `npu` and compiled contestants."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import native
from benchmarks.harness import Missing

SETUP_ERRORS = (RuntimeError, ImportError, NotImplementedError, AttributeError, TypeError, ValueError, AssertionError)


@contextlib.contextmanager
def needed(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns a failure to set a contestant up into Missing with the first line of the reason.

    `errors`: those that a library has of its own, beside Python's.
    """
    failures: tuple[type[Exception], ...] = (*SETUP_ERRORS, *errors)
    try:
        yield
    except Missing:
        raise
    except failures as error:
        raise Missing(f"{what}: {type(error).__name__}: {telling_line(str(error))}") from error


def telling_line(message: str) -> str:
    """The line of an error that says most: the host runtime's own, which torch_npu prints last, else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("[host runtime]")]
    return (own or lines or ["no message"])[0]


def npu() -> torch.device:
    """The first device of torch_npu.

    Raises:
        Missing: torch_npu is not loaded, or sees no device.
    """
    with needed("torch_npu"):
        if not hasattr(torch, "npu") or torch.npu.device_count() == 0:
            raise Missing("torch_npu: no device `npu`; run `npu-compiler doctor`")
        torch.npu.set_device(0)
        return torch.device("npu", 0)


def wait() -> Callable[[], None]:
    """Waits for the current stream: the wait of a server that needs a step's result, not of the whole device."""
    stream = torch.npu.current_stream()

    def synchronize() -> None:
        stream.synchronize()

    return synchronize


def read_bandwidth(size: int = 512 << 20, passes: int = 5) -> float:
    """Bytes per second that one thread reads here: the best of `passes` rounds of several ways to read `size` bytes,
    cut to a multiple of 256, in the order of their addresses (read_memory.cpp). Few enough bytes come from a cache.

    Raises:
        Missing: there is no C++ compiler, or no memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = native.compiled(
            "read_memory.cpp", Path(folder) / "read_memory.so", "-shared", "-fPIC", "-march=native"
        )
        read = ctypes.CDLL(str(library)).read_bandwidth
    read.restype, read.argtypes = ctypes.c_double, (ctypes.c_size_t, ctypes.c_int)
    found = float(read(size // 256 * 256, passes))
    if found <= 0:
        raise Missing(f"{size >> 20} MiB of memory to read; close other programs")
    return found


def nothing() -> None:
    """What there is to wait for on the CPU."""
