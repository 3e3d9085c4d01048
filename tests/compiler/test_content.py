"""graph/content.py: equal content, equal hash; other content, another hash; no content, an error that says where."""

from __future__ import annotations

import functools
import importlib.util
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from npu_compiler.errors import OptionError
from npu_compiler.graph.content import of_content

SOURCE = """
import dataclasses, helper
LIMIT = {limit}
def inner(x): return x + {step}
def outer(x, scale={scale}): return [inner(item) * scale for item in x if item < LIMIT]
class Pass:
    factor = {factor}
    def __init__(self, state): self.state = state
    def __call__(self, graph): return helper.work(graph)
made = Pass({{"a", "b", "c", "d"}})
"""
DEFAULTS = {"limit": 3, "step": 1, "scale": 2.0, "factor": 1}


def loaded(folder: Path, helper: str = "def work(graph): return 1", **changes: Any) -> ModuleType:
    """A user's module, imported from a file."""
    folder.mkdir(exist_ok=True)
    (folder / "helper.py").write_text(helper)
    (folder / "user.py").write_text(SOURCE.format(**DEFAULTS | changes))
    modules = []
    for name in ("helper", "user"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[1]


@pytest.mark.parametrize("changes", [{"limit": 4}, {"step": 2}, {"scale": 3.0}])
def test_function_counts_with_what_it_uses(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, same, other = loaded(tmp_path / "a"), loaded(tmp_path / "b"), loaded(tmp_path / "c", **changes)
    assert of_content(plain.outer, "it") == of_content(same.outer, "it")
    assert of_content(plain.outer, "it") != of_content(other.outer, "it")


def test_object_counts_with_class_state_and_helpers(tmp_path: Path) -> None:
    key = of_content(loaded(tmp_path / "a").made, "it")
    assert key == of_content(loaded(tmp_path / "a").made, "it")
    assert key != of_content(loaded(tmp_path / "a", factor=2).made, "it")
    assert key != of_content(loaded(tmp_path / "a", helper="def work(graph): return 2").made, "it")
    changed = loaded(tmp_path / "a").made
    changed.state.add("e")
    assert key != of_content(changed, "it")


def test_equal_in_every_process(tmp_path: Path) -> None:
    """Sets and hashes of strings differ from process to process; the key does not."""
    key = of_content(loaded(tmp_path).made, "it")
    code = "import user; from npu_compiler.graph.content import of_content; print(of_content(user.made, 'it'))"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split()[-1] == key


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, 1.0),
        (1, True),
        ("a", b"a"),
        ([1, 2], (1, 2)),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"a": 2}),
        (torch.float16, torch.bfloat16),
        (torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.ones(2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x - 1),
        (torch.nn.functional.silu, torch.nn.functional.gelu),
    ],
)
def test_different_values_differ(left: object, right: object) -> None:
    assert of_content(left, "it") != of_content(right, "it")
    assert of_content(left, "it") == of_content(left, "it")


def test_value_inside_itself() -> None:
    ring: list[object] = [1]
    ring.append(ring)
    other: list[object] = [2]
    other.append(other)
    assert of_content(ring, "it") != of_content(other, "it")


class Custom:
    """torch's convention for custom passes: what uuid() returns stands for the object."""

    def __init__(self, identity: object) -> None:
        self.identity, self.lock = identity, threading.Lock()

    def uuid(self) -> object:
        return self.identity


def test_uuid() -> None:
    assert of_content(Custom("a"), "it") == of_content(Custom("a"), "it") != of_content(Custom("b"), "it")
    with pytest.raises(OptionError, match=r"it can't enter the cache key: its uuid\(\) returns None"):
        of_content(Custom(None), "it")


@pytest.mark.parametrize(
    ("value", "place"),
    [([1, threading.Lock()], r"it\[1\]"), ({"a": iter([1])}, r"it\['a'\]\[1\]"), (io.StringIO(), "it")],
)
def test_what_has_no_content(value: Any, place: str) -> None:
    with pytest.raises(OptionError, match=rf"{place} can't enter the cache key"):
        of_content(value, "it")


def test_closure_is_named() -> None:
    lock = threading.Lock()

    def locked(x: Callable[[], int]) -> int:
        with lock:
            return x()

    with pytest.raises(OptionError, match="lock, which it closes over can't enter"):
        of_content(locked, "it")
