"""Start-up hook, run by `npu_compiler_runtime.pth` in every interpreter: imports nothing heavy.

`import torch` loads torch_npu through its entry point, and torch_npu's extension needs CANN's libraries at that
moment. The hook is a meta-path finder for two modules: it finds what Python would find, and

- lets the loader choose the libraries just before `torch_npu` runs; looking for torch_npu without importing it chooses
  nothing;
- registers the log `ascend` just behind `torch._logging`: `import torch` reads TORCH_LOGS soon after, and refuses
  names that it does not know by then.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LOG = "ascend"
LOGGERS = ("npu_compiler.backend", "npu_compiler.passes", "npu_compiler.aclgraph")
"""What TORCH_LOGS="+ascend" shows: the road of a graph, passes, captures."""


class _Loader:
    """A module loader that does something beside what Python's own loader does."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as Python itself would have loaded it (inspect and pkgutil ask the loader).
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)


class _LibrariesFirst(_Loader):
    """Has CANN's libraries loaded before `torch_npu` runs."""

    def exec_module(self, module: ModuleType) -> None:
        from npu_compiler.runtime import loader

        loader.load()
        super().exec_module(module)


class _LogRegistered(_Loader):
    """Registers our log behind `torch._logging`."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module._internal.register_log(LOG, list(LOGGERS))


_LOADERS: dict[str, type[_Loader]] = {"torch_npu": _LibrariesFirst, "torch._logging": _LogRegistered}


class _Finder:
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        loader = _LOADERS.get(fullname)
        if loader is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = loader(spec.loader)  # type: ignore[assignment]
        return spec


def install() -> None:
    """Puts the finder in front, once per interpreter."""
    if _Finder not in sys.meta_path and "torch_npu" not in sys.modules:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
