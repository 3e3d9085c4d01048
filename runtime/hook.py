"""Start-up hook, run by `npu_compiler_runtime.pth` in every interpreter: imports nothing heavy.

`import torch` loads torch_npu through its entry point, and torch_npu's extension needs CANN's libraries at that
moment. The hook is a meta-path finder for `torch_npu` alone: it finds what Python would find, and lets the loader
choose the libraries just before the module runs. Looking for torch_npu without importing it chooses nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _LibrariesFirst:
    """A module loader that has CANN's libraries loaded before `torch_npu` runs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from npu_compiler.runtime import loader

        loader.load()
        # From here on torch_npu is as Python itself would have loaded it (inspect and pkgutil ask the loader).
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)


class _TorchNpuFinder:
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _LibrariesFirst(spec.loader)  # type: ignore[assignment]
        return spec


def install() -> None:
    """Puts the finder in front, once per interpreter."""
    if _TorchNpuFinder not in sys.meta_path and "torch_npu" not in sys.modules:
        sys.meta_path.insert(0, _TorchNpuFinder)  # type: ignore[arg-type]
