"""The `ascend` backend of torch.compile, the vLLM plugin built on it, and CANN's C interface for the host CPU.

Importing this package imports neither torch nor anything else of size: the start-up hook does so in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from npu_compiler.backend import dropped, report
    from npu_compiler.config import Options
    from npu_compiler.errors import NpuCompilerError
    from npu_compiler.inspect.trace import trace
    from npu_compiler.passes.record import Pass
    from npu_compiler.passes.rewrite import Rule
    from npu_compiler.watching import watched

_HOMES = {
    "Options": "npu_compiler.config",
    "NpuCompilerError": "npu_compiler.errors",
    "Pass": "npu_compiler.passes.record",
    "Rule": "npu_compiler.passes.rewrite",
    "report": "npu_compiler.backend",
    "dropped": "npu_compiler.backend",
    "watched": "npu_compiler.watching",
    "trace": "npu_compiler.inspect.trace",
}
__all__ = ["NpuCompilerError", "Options", "Pass", "Rule", "__version__", "dropped", "report", "trace", "watched"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
