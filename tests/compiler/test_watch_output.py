"""What is watched is printed and saved behind each call, replays among them, as eager PyTorch has it on the CPU."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import npu_compiler
from npu_compiler.backend import AscendBackend, CompiledGraph, compile_fx
from npu_compiler.fusion_kernels.watched import new_batch
from tests.compiler.test_watched import check, hooked
from tests.passes.test_watch import Gate, Model

NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|nan|inf)"


def replays_of(model: nn.Module, inputs: list[Tensor], **options: Any) -> int:
    """Compiles and calls `model`, and says how many calls were replays."""
    torch._dynamo.reset()
    backend = AscendBackend()
    run = torch.compile(model.npu(), backend=backend, dynamic=False, options=options)
    with torch.inference_mode():
        for x in inputs:
            run(x.npu())
    return sum(graph.ledger.replays for graph in backend.compiled() if graph.ledger is not None)


def test_each_replay_prints_its_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    reference, inputs = Model().eval(), [torch.randn(4, 8) for _ in range(4)]
    model, gates = copy.deepcopy(reference), hooked(reference, "layers.1.gate")
    with torch.inference_mode():
        for x in inputs:
            reference(x)
    capsys.readouterr()
    assert replays_of(model, inputs, watch=["layers.1.gate:stats"]) == 3
    lines = capsys.readouterr().out.splitlines()
    for call, (line, expected) in enumerate(zip(lines, gates, strict=True)):
        place, shape, *figures = re.fullmatch(
            rf"watch graph_0 call {call}: (.*): aten\.mul\.Tensor, float32 (\[.*\]) "
            rf"{NUMBER} to {NUMBER}, mean {NUMBER} of 32",
            line,
        ).groups()  # type: ignore[union-attr]  # no match is a failure
        assert re.fullmatch(r"layers\.1\.gate at \S*test_watch\.py:\d+: .*silu\(left\) \* right.*", place)
        assert shape == "[4, 8]"
        wanted = [float(expected.min()), float(expected.max()), float(expected.double().mean())]
        assert [float(figure) for figure in figures] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_each_replay_saves_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, inputs = Model().eval(), [torch.randn(4, 8) for _ in range(3)]
    model, outputs = copy.deepcopy(reference), [hooked(reference, f"layers.{layer}.gate") for layer in (0, 1)]
    with torch.inference_mode():
        for x in inputs:
            reference(x)
    capsys.readouterr()
    options: dict[str, Any] = {"watch": ["layers.0.gate:values", "layers.1.gate:stats"], "watch_save": str(tmp_path)}
    assert replays_of(model, inputs, watch_print=False, **options) == 2
    assert capsys.readouterr().out == ""
    (folder,) = (tmp_path / "rank0").iterdir()
    lines = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    assert [(line["call"], line["place"][:13]) for line in lines] == [
        (call, f"layers.{layer}.gate") for call in range(3) for layer in (0, 1)
    ]
    for line in lines:
        expected = outputs[int(line["place"][7])][line["call"]]
        assert line["statistics"]["largest"] == pytest.approx(float(expected.max()), rel=1e-4)
        assert (line["dtype"], line["shape"]) == ("float32", [4, 8])
        if line["what"] == "values":
            value = load_file(folder / line["file"])[line["key"]]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in folder.glob("*.safetensors")) == [
        f"call_{call}.safetensors" for call in range(3)
    ]
    replays_of(model, inputs[:1], watch_print=False, **options)
    assert len(list((tmp_path / "rank0").iterdir())) == 2  # a second run leaves the first one's files alone


class Broken(nn.Module):
    """NaN wherever its input has a number below 0, from the second layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), Gate(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x)) + x.sqrt().sum(-1, keepdim=True)) + x


@pytest.mark.parametrize("watch", [["*:nan"], ["gate:nan", "down:nan", "*:inf"]])
def test_the_first_nan_is_told_once_with_its_place(watch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = torch.rand(4, 8), torch.rand(4, 8)
    bad[1, 2] = bad[3, 3] = -1.0
    capsys.readouterr()
    assert replays_of(Broken(), [good, good, bad, bad, good], watch=watch) == 4
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r"watch graph_0 call 2: first 2 NaN of 32 at \S*test_watch_output.py:\d+: .*x\.sqrt\(\)", line)
    assert re.search(
        r": aten\.sqrt\.default, float32 \[4, 8\]; [1-9]\d* later values of this call hold such, too$", line
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendCompilerFailed, match=r"(?s)OptionError: watch_save=.*file.*folder that can be written"):
        replays_of(Model(), [torch.rand(4, 8)], watch=["layers.0.gate:values"], watch_save=str(tmp_path / "file"))


def test_inside_of_a_users_own_capture_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    npu_compiler.watched()
    run = torch.compile(
        Model().npu(), backend=AscendBackend(), options={"watch": ["layers.0.gate:stats"], "capture": False}
    )
    x = torch.rand(4, 8).npu()
    graph = torch.npu.NPUGraph()
    with torch.inference_mode():
        run(x)
        capsys.readouterr()
        with torch.npu.graph(graph):
            run(x)
        assert capsys.readouterr().out == ""
        graph.replay()
        graph.replay()
    assert [seen.call for seen in npu_compiler.watched()] == [0, 1, 2]


def test_padding_does_not_count_where_the_batch_is_known() -> None:
    """The rows behind the batch hold NaN here; the caller says how many rows are real, as vLLM's runner does."""
    batch, model, made = new_batch(), Model(1).eval(), []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> CompiledGraph:
        options = {"watch": ["layers.0.gate:values", "layers.0.gate:nan"], "capture": False}
        made.append(compile_fx(gm, example_inputs, options, batch=batch))
        return made[-1]

    reference = copy.deepcopy(model)
    outputs = hooked(reference, "layers.0.gate")
    run = torch.compile(model.npu(), backend=backend)
    with torch.inference_mode():
        for step, (rows, size) in enumerate(((3, 4), (4, 4), (0, 4), (2, 6))):
            x = torch.randn(size, 8)
            reference(x[:rows])
            x[rows:] = torch.nan
            batch.copy_(torch.tensor([rows, step]))
            torch._dynamo.mark_dynamic(x := x.npu(), 0)
            run(x)
    (compiled,) = made
    assert compiled.notes is not None
    _, found = compiled.notes.since(0)
    assert [(seen.step, seen.rows, seen.shape[0]) for seen in found] == [(0, 3, 4), (1, 4, 4), (3, 2, 6)]
    for seen, expected in zip(found, (output for output in outputs if len(output)), strict=True):
        assert seen.value is not None and seen.what == "values"
        check(dataclasses.replace(seen, shape=tuple(expected.shape)), expected)
    assert "aten.mul.Tensor, float32 [3 of 4, 8]" in str(found[0]) and str(found[0]).startswith(
        "step 0: layers.0.gate at "
    )
