"""Imports point one way: serving -> backend -> {lowering, passes, plan, aclgraph} -> {graph, facts, fusion_kernels}."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "npu_compiler": "npu_compiler",
    "npu_compiler.passes": "passes",
    "npu_compiler.fusion_kernels": "fusion_kernels",
}
# The parts that each part may import, itself aside. config and errors are leaves that every part may import.
MAY_IMPORT = {
    "serving": {"backend", "runtime", "doctor"},
    "backend": {"cache", "lowering", "passes", "plan", "aclgraph", "graph", "facts", "fusion_kernels", "inspect"},
    "inspect": {"lowering", "passes", "plan", "aclgraph", "graph", "facts", "fusion_kernels", "runtime"},
    "cache": {"passes", "graph", "facts", "fusion_kernels"},
    "lowering": {"graph", "facts", "fusion_kernels"},
    "passes": {"graph", "facts", "fusion_kernels"},
    "aclgraph": {"plan", "graph", "facts", "fusion_kernels"},
    "plan": {"graph", "facts", "fusion_kernels"},
    "graph": {"facts"},
    "facts": set(),
    "fusion_kernels": {"graph", "facts"},
    "config": set(),
    "errors": set(),
}
LEAVES = {"config", "errors"}


def sources(part: str) -> Iterator[Path]:
    for package, folder in FOLDERS.items():
        base = ROOT / folder
        if package.endswith(f".{part}"):
            yield from base.rglob("*.py")
        elif package == "npu_compiler":
            single = base / f"{part}.py"
            yield from [single] if single.exists() else (base / part).rglob("*.py")


def imported_parts(file: Path) -> set[str]:
    """The parts of npu_compiler that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("npu_compiler.")}
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    files = list(sources(part))
    assert files, f"no sources of {part}"
    for file in files:
        wrong = imported_parts(file) - MAY_IMPORT[part] - LEAVES - {part}
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}, which {part} may not"


def test_importing_the_package_imports_nothing_heavy() -> None:
    """The start-up hook imports npu_compiler in every process of the environment."""
    code = "import sys, npu_compiler; print([m for m in ('torch', 'torch_npu', 'numpy', 'sympy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
