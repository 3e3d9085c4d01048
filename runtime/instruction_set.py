"""Which instructions the host runtime's kernels use in this process."""

from __future__ import annotations

import ctypes


def chosen() -> str:
    """The best that the processor has, or less where NPU_COMPILER_HOST_ISA says so.

    One of "baseline", "avx2", "avx512", "avx512_dots" (with dot products of bfloat16 and of bytes) and "amx" (with
    tiles besides).

    Raises:
        RuntimeError: the host runtime is not loaded.
    """
    try:
        function = ctypes.CDLL("libopapi.so").hostRuntimeInstructionSet
    except (OSError, AttributeError):
        raise RuntimeError(
            "no instruction set to name: the host runtime is not loaded in this process (a real CANN is used, or "
            "torch_npu was not imported yet)"
        ) from None
    function.restype, function.argtypes = ctypes.c_char_p, ()
    return bytes(function()).decode()
