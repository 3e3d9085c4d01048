"""Whether Triton can run kernels on the tensors at hand.

Asked of Triton itself: its active driver says which torch device it makes code for. triton-ascend's says npu, and is
active where CANN's compiler is; another Triton says something else, or has no driver at all. Under TRITON_INTERPRET=1
the kernels run on host tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

PACKAGE = "triton"


def missing(device: str) -> str:
    """Why Triton runs nothing on tensors of this device type; empty if it does."""
    found, reason = _target()
    return reason or ("" if found == device else f"{PACKAGE} makes code for {found}, not for {device}")


@functools.cache
def _target() -> tuple[str, str]:
    """The device type that Triton makes code for, or an empty text and the reason why there is none."""
    try:
        import triton

        from npu_compiler.fusion_kernels import triton_kernels

        if not isinstance(triton_kernels.gate_kernel, triton.JITFunction):
            return "cpu", ""
        return triton.runtime.driver.active.get_active_torch_device().type, ""
    except ImportError as error:
        return "", f"{PACKAGE} can't be imported: {error}"
    except (RuntimeError, AttributeError) as error:  # no driver, or several; an older Triton, or parts of two
        return "", f"{PACKAGE} has no driver: {error}"


def kernel(name: str) -> Callable[..., Any]:
    """The function of triton_kernels with this name, which is imported at its first call."""

    def run(*args: Any) -> Any:
        from npu_compiler.fusion_kernels import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run
