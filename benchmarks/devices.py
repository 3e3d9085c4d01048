"""What the rows share about `npu` and compiled contestants."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

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


def read_bandwidth(size: int = 512 << 20, passes: int = 7) -> float:
    """Bytes per second that one thread reads from memory here: the best of `passes` sums over `size` bytes."""
    numbers = torch.ones(size // 4)
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return size / min(seconds)


def nothing() -> None:
    """What there is to wait for on the CPU."""
