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
# The parts that each part may import, itself aside; LEAVES are those that every part may import.
MAY_IMPORT = {
    "serving": {"backend", "watching", "runtime", "doctor", "inspect"},
    "backend": {
        *(
            "portable",
            "cache",
            "compiled",
            "dumps",
            "key",
            "watching",
            "lowering",
            "passes",
            "plan",
            "aclgraph",
            "graph",
            "facts",
            "fusion_kernels",
            "inspect",
        )
    },
    "portable": {"cache", "compiled", "key", "graph"},
    "compiled": {"watching", "passes", "plan", "aclgraph", "graph", "fusion_kernels"},
    "key": {"passes", "graph", "fusion_kernels"},
    "watching": {"passes", "aclgraph", "fusion_kernels"},
    "dumps": {"inspect", "passes"},
    "commands": {"inspect", "cache", "doctor"},
    "inspect": {"cache", "lowering", "passes", "plan", "aclgraph", "graph", "facts", "fusion_kernels", "runtime"},
    "cache": {"passes", "graph", "facts", "fusion_kernels"},
    "lowering": {"graph", "facts", "fusion_kernels"},
    "passes": {"graph", "facts", "fusion_kernels"},
    "aclgraph": {"plan", "graph", "facts", "fusion_kernels", "runtime"},
    "plan": {"graph", "facts", "fusion_kernels"},
    "graph": {"facts"},
    "facts": set(),
    "fusion_kernels": {"graph", "facts"},
    "config": set(),
    "errors": set(),
    "reasons": set(),
    "stages": set(),
    "units": set(),
}
LEAVES = {"config", "errors", "reasons", "stages", "units"}


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


def test_a_compilation_imports_of_inductor_what_torch_needs_and_no_more() -> None:
    """Its passes alone take half a second to import, and a cold compilation takes a few."""
    code = """
import sys, torch, torch_npu
def step(x, rows, new):
    x.index_copy_(0, rows, new)
    x[0] = new[1]
    return x.clone() + x.clone()
arguments = torch.zeros(4, 8).npu(), torch.tensor([1, 2]).npu(), torch.ones(2, 8).npu()
with torch.inference_mode():
    torch.compile(step, backend="aot_eager")(*arguments)
    before = set(sys.modules)
    torch._dynamo.reset()
    torch.compile(step, backend="ascend")(*arguments)
print(sorted(name for name in set(sys.modules) - before if name.startswith("torch._inductor")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().splitlines()[-1] == "[]"
