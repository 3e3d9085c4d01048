"""Start-up hook, run by `npu_compiler_runtime.pth` in every interpreter: imports nothing heavy.

`import torch` loads torch_npu through its entry point, and torch_npu's extension needs CANN's libraries at that
moment. The hook is a meta-path finder that finds nothing; it only lets the loader choose the libraries when
`torch_npu` is about to be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType


class _BeforeTorchNpu:
    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if fullname == "torch_npu":
            sys.meta_path.remove(_BeforeTorchNpu)  # type: ignore[arg-type]
            from npu_compiler.runtime import loader

            loader.load()


def install() -> None:
    """Puts the finder in front, once per interpreter."""
    if _BeforeTorchNpu not in sys.meta_path and "torch_npu" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchNpu)  # type: ignore[arg-type]
