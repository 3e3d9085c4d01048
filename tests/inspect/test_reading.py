"""What is read out of bundles: why a rule did not fire, what differs between two, the pipeline as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.backend import AscendBackend
from npu_compiler.cli import main
from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.bundle import Bundle
from npu_compiler.inspect.diff import differences
from npu_compiler.inspect.why import why
from tests.one_rank import one_rank


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def near(x: Tensor, weight: Tensor) -> Tensor:
    """Not the root of the mean of the squares: of the cubes."""
    return weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


def gate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """silu(x) * y, where silu(x) is returned too."""
    active = torch.nn.functional.silu(x)
    return active * y, active


def dump(folder: Path, function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Bundle:
    torch._dynamo.reset()
    run = torch.compile(function, backend=AscendBackend(), dynamic=False, options={"dump": str(folder), **options})
    with torch.inference_mode():
        run(*(torch.ones(*shape).npu() for shape in shapes))
    return bundle.open(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bundles")
    dump(base / "norm", norm, (4, 16), (16,))
    dump(base / "again", norm, (4, 16), (16,))
    dump(base / "near", near, (4, 16), (16,))
    dump(base / "without", norm, (4, 16), (16,), disabled_rules=["rms_norm"])
    dump(base / "wider", norm, (4, 32), (32,))
    return base


def test_why_a_rule_missed_names_the_call_that_stopped_it(folder: Path) -> None:
    found = why(bundle.open(folder / "near").graph(), "rms_norm")
    assert found.fired == ()
    nearest = found.misses[0]
    assert 1 <= nearest.matched <= nearest.calls
    assert nearest.matched == max(miss.matched for miss in found.misses)
    assert nearest.reason.startswith("3, which pow_1 (aten.pow.Tensor_Scalar) leads to, is not 2")
    assert nearest.stopper == "pow_1"
    assert "x.pow(3)" in nearest.stopper_place
    assert f"matched {nearest.matched} of {nearest.calls} calls at {nearest.node}" in str(found)


def test_why_a_pattern_that_is_there_was_not_legal(tmp_path: Path) -> None:
    graph = dump(tmp_path, gate, (4, 16), (4, 16)).graph()
    name = next(rule.name for entry in graph.about.passes if entry.name == "swiglu" for rule in entry.rules)
    answers = [why(graph, rule.name) for entry in graph.about.passes if entry.name == "swiglu" for rule in entry.rules]
    misses = [miss for answer in answers for miss in answer.misses]
    assert misses, name
    assert any("is also used by output" in miss.reason and "proven" in miss.advice for miss in misses)


def test_why_a_rule_fired_or_was_not_tried(folder: Path) -> None:
    graph = bundle.open(folder / "norm").graph()
    fired = why(graph, "rms_norm")
    assert len(fired.fired) == 1
    assert "test_reading.py" in fired.fired[0].place
    assert why(graph, "rms_norm", "no such place").fired == ()
    assert why(graph, "rms_norm", "test_reading.py").fired == fired.fired
    assert "in disabled_rules" in why(bundle.open(folder / "without").graph(), "rms_norm").note
    idle = next(rule.name for entry in graph.about.passes if entry.name == "transpose_bmm" for rule in entry.rules)
    assert "the program has none before transpose_bmm" in why(graph, idle).note
    with pytest.raises(BundleError, match="did you mean 'rms_norm'"):
        why(graph, "rms_nrom")


def test_why_a_pass_without_rules_left_something_out(tmp_path: Path) -> None:
    def summed(x: Tensor, weight: Tensor) -> Tensor:
        total = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
        return torch.ops._c10d_functional.wait_tensor(total) * weight

    with one_rank():
        graph = dump(tmp_path, summed, (4, 16), (16,), sequence_parallel=1).graph()
    (miss,) = why(graph, "sequence_parallel").misses
    assert miss.reason == "group '0' has one rank"
    assert "left out at " in str(miss) and "test_reading.py" in miss.place
    assert why(graph, "sequence_parallel", "no such place").misses == ()
    assert why(graph, "common").note == "it found nothing to do"
    with pytest.raises(BundleError, match="did you mean 'sequence_parallel'"):
        why(graph, "sequence_paralel")


def test_equal_compilations_do_not_differ(folder: Path) -> None:
    assert differences(bundle.open(folder / "norm"), bundle.open(folder / "again")) == []


def test_the_first_difference_is_the_cause(folder: Path) -> None:
    one = bundle.open(folder / "norm")
    found = differences(one, bundle.open(folder / "without"))
    assert [(entry.stage, entry.what) for entry in found[:2]] == [
        ("options", "disabled_rules"),
        ("add_rms_norm", "rewrite 0"),
    ]
    assert found[0].right == "('rms_norm',)"
    assert "test_reading.py" in found[1].place
    assert found[2].what.startswith("program, from call")
    found = differences(one, bundle.open(folder / "near"))
    assert found[0].stage == "lowered"
    assert "aten.pow.Tensor_Scalar(" in found[0].left and ", 3)" in found[0].right
    found = differences(one, bundle.open(folder / "wider"))
    assert (found[0].stage, found[0].what.split()[-2]) == (
        "lowered",
        one.graph().program(one.graph().stages[0]).calls[0].name,
    )
    assert "[4, 16]" in found[0].left and "[4, 32]" in found[0].right


def test_versions_and_graphs_that_one_side_lacks(folder: Path, tmp_path: Path) -> None:
    one = dump(tmp_path, norm, (4, 16), (16,))
    header = json.loads((tmp_path / "rank0" / "bundle.json").read_text())
    header["environment"]["versions"]["torch"] = "1.0"
    (tmp_path / "rank0" / "bundle.json").write_text(json.dumps(header))
    dump(tmp_path, near, (4, 16), (16,))
    found = differences(bundle.open(folder / "norm"), bundle.open(one.place))
    assert (found[0].stage, found[0].what, found[0].right) == ("environment", "torch", "1.0")
    assert found[-1].what == "compiled on one side only"
    assert found[-1].left == "nothing"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def test_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", folder / "norm")
    assert "fired rms_norm" in text
    assert "rms_norm x1: aclnnRmsNorm" in text
    assert "captured static" in text
    assert "def program(" in printed(capsys, "show", folder / "norm", "--stage", "final")
    data = json.loads(printed(capsys, "show", folder / "norm", "--json"))
    assert data[0]["format"] == 1
    text = printed(capsys, "why", folder / "near", "rms_norm")
    assert "fired 0 times" in text
    (answer,) = json.loads(printed(capsys, "why", folder / "near", "rms_norm", "--json"))
    assert answer["misses"][0]["matched"] >= 1
    assert printed(capsys, "diff", folder / "norm", folder / "again") == "nothing differs but times\n"
    assert "options: disabled_rules" in printed(capsys, "diff", folder / "norm", folder / "without", code=1)
    assert json.loads(printed(capsys, "diff", folder / "norm", folder / "near", "--json", code=1))
    assert main(["show", str(folder / "nowhere")]) == 2
    assert "there is no bundle at" in capsys.readouterr().err
