"""What is read out of bundles: why a rule did not fire, what differs between two, the pipeline as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_compiler.backend import AscendBackend
from npu_compiler.cli import main
from npu_compiler.errors import BundleError
from npu_compiler.graph.source import Place
from npu_compiler.inspect import bundle, show
from npu_compiler.inspect.bundle import Bundle
from npu_compiler.inspect.contents import Attempt, PassInfo, RuleInfo, Stage
from npu_compiler.inspect.diff import differences
from npu_compiler.inspect.over_layers import grouped
from npu_compiler.inspect.program import Named, Program
from npu_compiler.inspect.why import answers, why
from npu_compiler.units import in_bytes
from tests.inspect.made import call, program, written
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
    dump(base / "less", norm, (4, 16), (16,), disabled_passes=["add_rms_norm"])
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
    (miss, *_) = [miss for miss in misses if miss.whole]
    assert "is also used by output" in miss.reason
    assert str(miss).splitlines()[1:] == [f"  not allowed: {miss.reason}"]


def test_why_a_rule_fired_or_was_not_tried(folder: Path) -> None:
    graph = bundle.open(folder / "norm").graph()
    fired = why(graph, "rms_norm")
    assert len(fired.fired) == 1
    assert "test_reading.py" in fired.fired[0].place
    assert str(fired).startswith("rms_norm (add_rms_norm): fired once, missed ")
    reasons = [attempt.reason for stage in graph.stages for attempt in stage.attempts]
    assert any(reason.startswith("arg0_1 is an input, the rule wants ") for reason in reasons)
    assert why(graph, "rms_norm", "test_reading.py").fired == fired.fired
    assert "in disabled_rules" in why(bundle.open(folder / "without").graph(), "rms_norm").note
    idle = next(rule.name for entry in graph.about.passes if entry.name == "transpose_bmm" for rule in entry.rules)
    assert "the program has none before transpose_bmm" in why(graph, idle).note
    with pytest.raises(BundleError, match="did you mean 'rms_norm'"):
        why(graph, "rms_nrom")


def test_why_names_what_there_is_instead_of_the_place_that_was_asked_for(folder: Path) -> None:
    graph = bundle.open(folder / "norm").graph()
    with pytest.raises(BundleError, match="did you mean 'rsqrt'") as caught:
        why(graph, "rms_norm", "rsqt")
    assert "has no call 'rsqt', and no call from such a place" in str(caught.value)
    with pytest.raises(BundleError, match=r"has no call .nowhere\.py:3."):
        why(graph, "common", "nowhere.py:3")
    note = why(bundle.open(folder / "near").graph(), "rms_norm", "rsqrt").note
    wrong, _, ends = note.partition("; the pattern ends in one of ")
    assert wrong == "it was not tried: rsqrt is a call of aten.rsqrt.default"
    assert "aten.mul.Tensor" in ends.split(" or ")
    name = graph.stage("add_rms_norm").fired[0].nodes[-1]
    assert why(graph, "mul_add", name).note.startswith(f"it was not tried: rms_norm had taken {name} before mul_add")
    at = why(graph, "transpose_bmm", "test_reading.py").note
    assert at.startswith("it was not tried: the pattern ends in a call of aten.")


def test_why_a_pass_was_no_part_of_the_compilation(folder: Path) -> None:
    graph = bundle.open(folder / "less").graph()
    assert str(why(graph, "add_rms_norm")) == "add_rms_norm: it was not tried: add_rms_norm is in disabled_passes"
    of = "it was not tried: it is a rule of add_rms_norm, which was not run: add_rms_norm is in disabled_passes"
    assert why(graph, "rms_norm").note == of
    for name, option in (("sequence_parallel", "0"), ("matmul_all_reduce", "0")):
        assert why(graph, name).note == f"it was not tried: it needs the option {name}, which is {option} here"
    assert why(graph, "user_rules").note == "it was not tried: it needs the option rules, which is () here"
    assert "for models that vLLM serves" in why(graph, "qkv_attention").note
    with pytest.raises(BundleError) as caught:
        why(graph, "comon")
    assert caught.value.rule.count(" common") == 1 and caught.value.fix == "did you mean 'common'?"
    found = answers([graph], "cat_split")
    assert [answer.rule for _, answer in found] == ["cat_of_parts", "cat_of_cats", "slice_of_cat", "part_of_cat"]


def test_only_the_nearest_misses_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calls = [call(f"mul_{index}", "x", "x", storage=index + 1, target="aten.mul.Tensor") for index in range(9)]
    attempts = [
        Attempt(rule="rms_norm", anchor=f"mul_{index}", place="a.py:1", matched=1 + (index == 7), reason="no")
        for index in range(9)
    ]
    rule = RuleInfo(name="rms_norm", roots=("aten.mul.Tensor",), calls=6)
    stages = [
        Stage(name="lowered"),
        Stage(name="add_rms_norm", ran=True, attempts=tuple(attempts)),
        Stage(name="final"),
    ]
    passes = [PassInfo(name="add_rms_norm", place="", rules=(rule,))]
    written(tmp_path, [(stage, program(*calls)) for stage in stages], about={"passes": passes})
    lines = printed(capsys, "why", tmp_path, "rms_norm").splitlines()
    assert [line.split(": ")[0] for line in lines if line.startswith("matched")] == [
        "matched 2 of 6 calls at mul_7",
        "matched 1 of 6 calls at mul_0",
        "matched 1 of 6 calls at mul_1",
    ]
    assert lines[-1] == "and 6 more, the nearest of which matched 1 of 6 calls; --all shows them"
    assert printed(capsys, "why", tmp_path, "rms_norm", "--all").count("\nmatched") == 9
    (answer,) = json.loads(printed(capsys, "why", tmp_path, "rms_norm", "--json"))
    assert len(answer["misses"]) == 9
    assert main(["why", str(tmp_path), "rms_norm", "mul_70"]) == 2


def test_why_a_pass_without_rules_left_something_out(tmp_path: Path) -> None:
    def summed(x: Tensor, weight: Tensor) -> Tensor:
        total = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
        return torch.ops._c10d_functional.wait_tensor(total) * weight

    with one_rank():
        graph = dump(tmp_path, summed, (4, 16), (16,), sequence_parallel=1).graph()
    (miss,) = why(graph, "sequence_parallel").misses
    assert miss.reason == "group '0' has one rank"
    assert "left out at " in str(miss) and "test_reading.py" in miss.place
    with pytest.raises(BundleError, match="has no call 'no such place'"):
        why(graph, "sequence_parallel", "no such place")
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


def test_a_difference_is_told_where_it_begins_and_not_again(folder: Path) -> None:
    found = differences(bundle.open(folder / "norm"), bundle.open(folder / "less"))
    assert [(entry.stage, entry.what) for entry in found[:2]] == [
        ("options", "disabled_passes"),
        ("passes", "on one side only"),
    ]
    assert (found[1].left, found[1].right) == ("add_rms_norm", "nothing")
    programs = [entry for entry in found if entry.what.startswith("program, ")]
    assert programs and len({(entry.left, entry.right) for entry in programs}) == len(programs)
    assert not [entry for entry in found if entry.stage.startswith(("stages", "streams"))]


def on(device: str, of: Program) -> Program:
    return Program.model_validate_json(of.model_dump_json().replace("npu:0", device))


def test_ranks_differ_in_more_than_their_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lowered", "noop", "final")
    put = Named(kind="device", text="npu:0")
    copied = call("copy", "x", storage=1, target="aten.to.device", kwargs={"device": put})
    same = program(copied, call("a", "copy", storage=2))
    other = program(copied, call("a", "copy", storage=2, target="aten.mul.Tensor"))
    bundles = [
        written(
            tmp_path / str(number), [(Stage(name=name), of) for name in names], environment={"rank": rank, "ranks": 2}
        )
        for number, (rank, of) in enumerate(
            [(0, same), (1, on("npu:1", same)), (1, on("npu:1", other)), (0, on("npu:1", same))]
        )
    ]
    assert differences(bundles[0], bundles[1]) == []
    (found,) = differences(bundles[0], bundles[2])
    assert (found.stage, found.what) == ("lowered", "program, from call a on")
    assert "aten.add.Tensor" in found.left and "aten.mul.Tensor" in found.right
    (found,) = differences(bundles[0], bundles[3])
    assert found.what == "program, from call x on" and "on npu:1" in found.right
    assert printed(capsys, "diff", tmp_path / "0", tmp_path / "1") == "nothing differs but the rank, and times\n"


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


class Layer(nn.Module):
    def __init__(self, large: bool) -> None:
        super().__init__()
        self.weight, self.down = nn.Parameter(torch.ones(8)), nn.Linear(8, 8, bias=False)
        self.large = large

    def forward(self, x: Tensor) -> Tensor:
        h = norm(x, self.weight)
        return x + self.down(h.sin() if self.large else h)


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(large=index == 0) for index in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_the_same_in_all_layers_is_one_line(tmp_path: Path) -> None:
    """Also where only a few layers are compiled, which stand for the others."""
    lines = {}
    for once in (True, False):
        model = Model(9).npu()
        stored = dump(tmp_path / str(once), model, (2, 8), layers_once=once)
        lines[once] = [line.strip() for line in show.overview(stored, stored.graphs).splitlines() if "fired" in line]
    assert any("layers_once" in line for line in lines[True])
    assert [line for line in lines[True] if "layers_once" not in line] == lines[False]
    (later,) = (line for line in lines[False] if line.startswith("fired add_rms_norm"))
    assert re.match(
        r"fired add_rms_norm x8, layers 1-8: layers\.\* at \S*test_reading\.py:\d+: return weight \* ", later
    )


def test_layers_that_are_not_in_a_row_are_listed() -> None:
    places = [(f"model.h.{layer}.mlp at a.py:3: y", 1) for layer in (0, 1, 2, 5, 7, 7)]
    others = [("model.h.3.norm at a.py:3: y", 1), ("a.py:9: raise at 3", 1), ("a.py:9: raise at 3", 1), ("node x", 1)]
    assert list(grouped([*places, *others])) == [
        (" x6, h 0-2, 5, 7", "model.h.*.mlp at a.py:3: y"),
        ("", "model.h.3.norm at a.py:3: y"),
        (" x2", "a.py:9: raise at 3"),
        ("", "node x"),
    ]
    standing_for_more = [("layers.0 at b.py:1: z", 1), ("layers.2 at b.py:1: z", 24), ("layers.3 at b.py:1: z", 1)]
    assert list(grouped(standing_for_more)) == [(" x26, layers 0, 2-26", "layers.* at b.py:1: z")]
    assert list(grouped([("0 at b.py:1: z", 1), ("1 at b.py:1: z", 1)])) == [(" x2, modules 0-1", "* at b.py:1: z")]


def test_bytes_have_units_and_files_of_packages_their_short_names(folder: Path) -> None:
    assert [in_bytes(count) for count in (0, 1023, 1024, "8704", 131072, 10**9, "512*s0", -3000)] == [
        *("0 B", "1023 B", "1.0 KiB", "8.5 KiB", "128 KiB", "954 MiB", "512*s0 bytes", "-2.9 KiB")
    ]
    text = show.overview(bundle.open(folder / "norm"), bundle.open(folder / "norm").graphs)
    assert re.search(r"order: .*, [\d.]+ K?i?B alive at once", text)
    assert re.search(r"memory: \d+ storages, [\d.]+ K?i?B in one block", text)
    place = Place("m", "/home/me/.venv/lib/python3.11/site-packages/transformers/models/a.py", 3, "f", "x + y")
    assert str(place) == "m at transformers/models/a.py:3: x + y" and place.file.startswith("/home/me")
    assert Place("", "/home/me/model.py", 3, "f", "x").code == "/home/me/model.py:3: x"


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
