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
from npu_compiler.graph.source import where
from npu_compiler.stages import CAPTURE, FIRST_CALL, LOWERING, ORDER, PASSES, PLAN, STORE


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
    assert ProgramCache(place).entries()[-1]["missed"] == ["your rule own is new"]
    assert compile_anew(gated, *inputs, rules=[dataclasses.replace(own, after=("aten.neg.default",))]) == "stored"
    assert ProgramCache(place).entries()[-1]["missed"] == ["your rule own has another content"]


def test_of_the_inputs_those_are_named_that_differ(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    compile_anew(gated, x, weight)
    assert compile_anew(gated, torch.cat([x, x]), weight) == "stored"
    (line,) = ProgramCache(place).entries()[-1]["missed"]
    assert (
        line.startswith("input 0: Tensor torch.float32 npu:0 (4, 32)") and " -> Tensor torch.float32 npu:0 (8," in line
    )


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
    table = torch._dynamo.assume_constant_result(lambda: torch.ones(32, device="npu"))
    assert "not stored: it holds the module or constant" in compile_anew(lambda x: x + table(), inputs[0])


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


def test_another_constant_is_another_program(
    place: Path, inputs: tuple[Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    def clipped(least: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(x > 0.5, x, torch.tensor([least, 1.0], device=x.device).sum())

    x = inputs[0]
    assert compile_anew(clipped(0.25), x) == "stored"
    assert compile_anew(clipped(0.25), x) == "from the cache"
    assert compile_anew(clipped(-0.25), x) == "stored"
    assert cli.main(["explain-miss"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  constant"))
    assert "constant tensor: tensor ([0.25, 1.0],)" in line and "-> tensor ([-0.25, 1.0],)" in line


OFFSET = 1.5


@torch.compiler.allow_in_graph
def shifted(x: Tensor) -> Tensor:
    return x + torch.tensor(OFFSET, device=x.device)


def test_functions_that_dynamo_does_not_look_into_count_by_content(
    place: Path, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that one reads is a constant of the program, which Dynamo's graph does not show."""

    def function(x: Tensor) -> Tensor:
        return shifted(x) * 2  # type: ignore[no-any-return]  # allow_in_graph is untyped

    assert compile_anew(function, inputs[0]) == "stored"
    assert compile_anew(function, inputs[0]) == "from the cache"
    monkeypatch.setitem(globals(), "OFFSET", -1.5)
    assert compile_anew(function, inputs[0]) == "stored"  # which also compares with eager


def test_calls_of_a_stored_program_have_their_places(place: Path, inputs: tuple[Tensor, Tensor]) -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU()), torch.nn.Tanh()).npu()
    found = []
    for did in ("stored", "from the cache"):
        before = set(ascend.compiled())
        assert compile_anew(model, inputs[0]) == did
        (compiled,) = set(ascend.compiled()) - before
        assert compiled.graph is not None
        found.append([str(where(node)) for node in compiled.graph.graph.nodes if node.op == "call_function"])
    cold, warm = found
    assert warm == cold
    assert [line.split(" at ")[0] for line in warm][-2:] == ["0.1", "1"]


def test_functions_without_a_name_have_no_key(inputs: tuple[Tensor, Tensor]) -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    next(node for node in graph.graph.nodes if node.op == "call_function").target = lambda a, b: a + b
    assert "has no name" in str(graph_parts(graph, [inputs[0]]))


def test_another_process_finds_it(place: Path) -> None:
    """The mask of transformers' encoders is made with torch.tensor(0.0), a constant of the program."""
    program = (
        "import json, torch, npu_compiler\n"
        "from benchmarks import models\n"
        "from npu_compiler.graph.constants import to_bytes\n"
        "from tests.compiler.test_cache import ascend, compile_anew, gated\n"
        "x, weight = torch.ones(4, 32, device='npu'), torch.ones(32, 64, device='npu')\n"
        "function = compile_anew(gated, x, weight)\n"
        "step, arguments = models.step('bert', 2, x.device), models.inputs('bert', x.device)\n"
        "with torch.inference_mode():\n"
        "    found = torch.compile(step, backend='ascend', fullgraph=True, options={'cache': True})(*arguments)\n"
        "encoder = ascend.compiled()[-1]\n"
        "constants = len(encoder.graph.graph.find_nodes(op='get_attr'))\n"
        "stages = list(encoder.stages.costs)\n"
        "print(json.dumps([function, encoder.stored, constants, stages, to_bytes(found).hex()]))\n"
    )
    root = Path(__file__).parents[2]
    cold, warm = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    assert cold[:3] == ["stored", "stored", 1]
    assert warm[:3] == ["from the cache", "from the cache", 1]
    assert {LOWERING, PASSES, ORDER, STORE} < set(cold[3])
    assert set(warm[3]) == {PLAN, FIRST_CALL, CAPTURE}
    assert warm[4] == cold[4]


def _fakes(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return [mode.from_tensor(tensor) for tensor in inputs]
