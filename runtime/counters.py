"""What the host runtime counted in this process: tasks, replays, captures, host synchronisations ...

    before = counters.read()
    ...
    print(counters.difference(before)["host_synchronizations"])

The names are listed in docs/host_runtime.md. With a real CANN there is no counter: read() raises RuntimeError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping


def _function() -> Callable[..., int]:
    try:
        function = ctypes.CDLL(None).hostRuntimeCounters
    except AttributeError:
        raise RuntimeError(
            "no counters: the host runtime is not loaded in this process (a real CANN is used, or torch_npu was not "
            "imported yet)"
        ) from None
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    return function


def read() -> dict[str, int]:
    """Every counter of the process, by name, since the process began.

    Raises:
        RuntimeError: the host runtime is not loaded.
    """
    function = _function()
    size = function(None, None, 0)
    names = (ctypes.c_char_p * size)()
    values = (ctypes.c_uint64 * size)()
    function(names, values, size)
    return {(name or b"").decode(): value for name, value in zip(names, values, strict=True)}


def difference(before: Mapping[str, int]) -> dict[str, int]:
    """How much each counter grew since `before`, an earlier read()."""
    return {name: value - before[name] for name, value in read().items()}
