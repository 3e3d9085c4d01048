"""Compiled programs on disk: what is found again, what is not and why, what a damaged file does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler import cache, cli
from npu_compiler.backend import ascend
from npu_compiler.cache import FOLDER, Program, ProgramCache, graph_parts


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x @ weight).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def two(x: Tensor, weight: Tensor) -> Tensor:
    return x + weight[0, : x.shape[1]]


def compile_anew(function: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None, **options: Any) -> str:
    """Compiles and runs `function` as a new process would; what the cache did."""
    torch._dynamo.reset()
    before = set(ascend.compiled())
    compiled = torch.compile(function, backend="ascend", dynamic=dynamic, options={"cache": True, **options})
    with torch.inference_mode():
        for _ in range(3):
            found = compiled(*inputs)
        torch.testing.assert_close(found, function(*inputs))
    (graph,) = set(ascend.compiled()) - before
    return graph.stored


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 32, device="npu"), torch.randn(32, 64, device="npu")


def test_same_function_is_found_again(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    assert compile_anew(gated, *inputs) == "stored"
    assert compile_anew(gated, *inputs) == "from the cache"
    assert len(ProgramCache(place).entries()) == 1


def test_dynamic_sizes_are_found_again_for_other_sizes(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    assert compile_anew(gated, x, weight, dynamic=True) == "stored"
    assert compile_anew(gated, torch.randn(7, 32, device="npu"), weight, dynamic=True) == "from the cache"


def test_graph_inputs_and_options_are_told_apart(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    for call in (
        lambda: compile_anew(gated, x, weight),
        lambda: compile_anew(two, x, weight),
        lambda: compile_anew(gated, x.half(), weight.half()),
        lambda: compile_anew(gated, x, weight.t().contiguous().t()),
        lambda: compile_anew(gated, x, weight, disabled_passes=["swiglu"]),
        lambda: compile_anew(gated, x, weight, capture_limit=8),
    ):
        assert call() == "stored"


def test_inputs_that_share_memory_are_another_program(place: Path) -> None:
    def adds(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    both = torch.zeros(8, device="npu")
    assert compile_anew(adds, both[:4], torch.zeros(4, device="npu")) == "stored"
    torch._dynamo.reset()
    compiled = torch.compile(adds, backend="ascend", options={"cache": True})
    with torch.inference_mode():
        x = torch.zeros(4, device="npu")
        assert compiled(x, x).tolist() == [1.0] * 4
        assert compiled(x, x).tolist() == [4.0] * 4


def test_user_rules_are_part_of_the_key(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    from npu_compiler.passes.swiglu import RULES

    assert compile_anew(gated, *inputs) == "stored"
    own = dataclasses.replace(RULES[0], name="own")
    assert compile_anew(gated, *inputs, rules=[own]) == "stored"
    assert compile_anew(gated, *inputs, rules=[own]) == "from the cache"


def test_miss_says_what_differed(
    place: Path, inputs: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    compile_anew(gated, *inputs)
    compile_anew(gated, *inputs, capture_limit=8)
    assert cli.main(["explain-miss"]) == 0
    printed = capsys.readouterr().out
    assert "nothing is stored yet" in printed
    assert "option capture_limit: 64 -> 8" in printed
    assert "gate, up = (x @ weight).chunk(2, dim=-1)" in printed
    assert cli.main(["explain-miss", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_hashes_are_said_in_words_and_the_newest_come_by_default(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = cache.ProgramCache(place)
    for number in range(12):
        file = place / "00" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = {"graph": "0" * 64, "sources": f"{number:064x}"}
        about = {"name": f"model_{number}.py:3", "parts": parts, "missed": stored.explain(parts), "stored": number}
        file.write_text(json.dumps(about))
    assert stored.explain({"graph": "1" * 64, "sources": "0" * 64, "state": "x"}) == [
        "it is another graph: the function, or how Dynamo traced it, changed",
        "state: absent -> x",
    ]
    names = [f"model_{number}.py:3" for number in range(12)]
    for arguments, shown in (([], names[2:]), (["--all"], names), (["model_1"], [names[1], *names[10:]])):
        assert cli.main(["explain-miss", *arguments]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line.startswith("model")] == shown
        assert "  the compiler's sources changed" in printed and ("2 older ones: --all" in printed) == (not arguments)


def test_damaged_file_is_a_miss(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    compile_anew(gated, *inputs)
    (file,) = place.glob("*/*.program")
    file.write_bytes(file.read_bytes()[:-1])
    assert compile_anew(gated, *inputs) == "stored"
    assert compile_anew(gated, *inputs) == "from the cache"


def test_what_is_not_stored_says_why(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    assert "not stored: outputs are views of inputs" in compile_anew(lambda x: (x[1:], x + 1), inputs[0])


def test_oldest_entries_leave(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    compile_anew(gated, *inputs)
    (first,) = place.glob("*/*.program")
    os.utime(first, (0, 0))
    (about,) = ProgramCache(place).entries()
    program = ProgramCache(place).load(about["parts"], _fakes(inputs))
    assert isinstance(program, Program)
    os.utime(first, (0, 0))
    ProgramCache(place, limit=first.stat().st_size * 3 // 2).store("another", {"graph": "another"}, program)
    assert not first.exists()
    assert [entry["name"] for entry in ProgramCache(place).entries()] == ["another"]


def test_functions_without_a_name_have_no_key(inputs: tuple[Tensor, Tensor]) -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    next(node for node in graph.graph.nodes if node.op == "call_function").target = lambda a, b: a + b
    assert "has no name" in str(graph_parts(graph, [inputs[0]]))


def test_another_process_finds_it(place: Path) -> None:
    program = (
        "import torch, npu_compiler, warnings\n"
        "from tests.compiler.test_cache import compile_anew, gated\n"
        "x, weight = torch.ones(4, 32, device='npu'), torch.ones(32, 64, device='npu')\n"
        "print('cache:', compile_anew(gated, x, weight))\n"
    )
    root = Path(__file__).parents[2]
    said = [
        subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "cache: stored" in said[0]
    assert "cache: from the cache" in said[1]


def _fakes(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return [mode.from_tensor(tensor) for tensor in inputs]
