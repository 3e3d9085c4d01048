"""Bundles: what a compilation leaves behind, read back."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from npu_compiler import Pass
from npu_compiler.backend import AscendBackend, CompiledGraph
from npu_compiler.cli import main
from npu_compiler.config import Options
from npu_compiler.errors import BundleError, OptionError
from npu_compiler.inspect import bundle, page, show
from npu_compiler.inspect.bundle import Bundle, StoredGraph
from npu_compiler.inspect.contents import SavedTensor
from npu_compiler.passes import pipeline
from npu_compiler.passes.record import PassRecord

ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    """A norm and a gated product, which two rules take."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(size))
        self.gate_up = nn.Linear(size, 4 * size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        h = self.norm * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up, total


def dumped(folder: Path, *rows: int, **options: Any) -> tuple[CompiledGraph, StoredGraph]:
    """A block compiled with a dump and called twice with each number of rows; its folder has no other graph."""
    torch._dynamo.reset()
    backend = AscendBackend()
    run = torch.compile(Block().npu(), backend=backend, dynamic=True, options={"dump": str(folder), **options})
    with torch.inference_mode():
        for count in rows:
            for _ in range(2):
                run(torch.full((count, 16), 0.625).npu(), torch.rand(count, 16).npu())
    (compiled,) = backend.compiled()
    return compiled, bundle.open(folder).graph()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledGraph, Path]:
    folder = tmp_path_factory.mktemp("dump")
    os.environ["A_TOKEN"], os.environ["NPU_COMPILER_NOTE"] = "s3cr3t", "mine"
    try:
        compiled, _ = dumped(folder, 3, 5)
    finally:
        del os.environ["A_TOKEN"], os.environ["NPU_COMPILER_NOTE"]
    return compiled, folder


def test_stages_and_records_are_those_of_the_compilation(written: tuple[CompiledGraph, Path]) -> None:
    compiled, folder = written
    graph = bundle.open(folder).graph()
    names = [entry.name for entry in pipeline.selected(compiled.options)]
    assert [stage.name for stage in graph.stages] == ["lowered", *names, "final"]
    assert [entry.name for entry in graph.about.passes] == names
    ran = [stage for stage in graph.stages if stage.ran]
    for stage, record in zip(ran, compiled.records, strict=True):
        assert [(fire.rule, fire.place, fire.nodes) for fire in stage.fired] == [
            (fire.rule, fire.place, fire.nodes) for fire in record.fired
        ]
        assert [refusal.reason for refusal in stage.refused] == [refusal.reason for refusal in record.refused]
        assert record.attempts is None, "they are in the bundle, and nowhere else"
        assert stage.seconds == record.seconds
        assert stage.calls_of_all == record.nodes_after


def test_a_rewrite_names_the_calls_that_went_and_came(written: tuple[CompiledGraph, Path]) -> None:
    graph = bundle.open(written[1]).graph()
    stages = {stage.name: stage for stage in graph.stages}
    (fire,) = stages["add_rms_norm"].fired
    before = graph.stages[[stage.name for stage in graph.stages].index("add_rms_norm") - 1]
    left = {call.name: call for call in graph.program(stages["add_rms_norm"]).calls}
    assert set(fire.nodes) <= {call.name for call in graph.program(before).calls}
    assert not set(fire.nodes) & set(left)
    assert left[fire.made[0]].target == "npu_fused.add_rms_norm.default"
    assert left[fire.made[0]].made_by == "add_rms_norm"
    assert fire.kernels is not None and fire.kernels > 0
    assert "test_bundle.py" in fire.place


def test_plan_captures_and_facts(written: tuple[CompiledGraph, Path]) -> None:
    compiled, folder = written
    graph = bundle.open(folder).graph()
    assert graph.plan is not None and graph.plan.memory is not None and graph.plan.order is not None
    assert compiled.memory is not None and compiled.ledger is not None and compiled.arrangement is not None
    assert graph.plan.memory.peak == str(compiled.memory.peak_formula)
    assert len(graph.plan.memory.blocks) == len(compiled.memory.blocks)
    assert graph.plan.order.peaks == compiled.arrangement.peaks
    assert any("aclnnAddRmsNorm" in line for line in graph.plan.providers)
    assert [entry.key for entry in graph.captures] == [entry.key for entry in compiled.ledger.captures]
    assert len(graph.captures) == 2
    assert [entry.replays for entry in graph.captures] == [0, 1]


def test_questions_about_sizes_are_kept_with_their_answers(tmp_path: Path) -> None:
    run = torch.compile(
        lambda x, y: torch.cat([x, y])[: x.shape[0]] * 2,
        backend=AscendBackend(),
        dynamic=True,
        options={"dump": str(tmp_path)},
    )
    run(torch.rand(5, 4).npu(), torch.rand(3, 4).npu())
    graph = bundle.open(tmp_path).graph()
    asked = [fact for stage in graph.stages for fact in stage.asked]
    assert {"true", "unknown"} & {fact.answer for fact in asked}
    assert any(symbol in fact.text for symbol in graph.program(graph.stages[0]).sizes for fact in asked)


def test_environment_options_and_inputs_are_told_secrets_are_not(written: tuple[CompiledGraph, Path]) -> None:
    found = bundle.open(written[1])
    assert found.header.environment.versions["torch"] == torch.__version__
    assert found.header.environment.cann.startswith(("host", "cann"))
    assert found.header.environment.variables["NPU_COMPILER_NOTE"] == "mine"
    about = found.graph().about
    assert about.given == ("dump",)
    assert about.options["layers_once"] == "True"
    assert "norm" in about.inputs
    files = [file for file in written[1].rglob("*") if file.is_file()]
    assert not any("s3cr3t" in file.read_text() for file in files)
    assert not any(file.suffix == ".safetensors" for file in files), "neither inputs nor weights"


def test_printed_programs_are_what_the_data_prints(written: tuple[CompiledGraph, Path]) -> None:
    graph = bundle.open(written[1]).graph()
    files = {stage.program for stage in graph.stages}
    assert 3 <= len(files) < len(graph.stages), "a program that did not change is written once"
    for stage in graph.stages:
        lines = (Path(str(graph.place)) / f"{stage.program}.py").read_text().splitlines()
        assert lines[1:] == graph.python(stage).splitlines()[1:]  # the first names the stage that wrote it


def test_a_zip_is_the_same_bundle(written: tuple[CompiledGraph, Path], tmp_path: Path) -> None:
    whole = shutil.make_archive(str(tmp_path / "whole"), "zip", written[1])
    below = shutil.make_archive(str(tmp_path / "below"), "zip", written[1] / "rank0")
    folder = bundle.open(written[1]).graph()
    for zipped in (bundle.open(whole), bundle.open(below), bundle.open(Path(whole) / "rank0")):
        assert zipped.header == bundle.open(written[1]).header
        graph = zipped.graph()
        assert (graph.about, graph.stages, graph.plan, graph.captures) == (
            *(folder.about, folder.stages, folder.plan, folder.captures),
        )
        assert graph.program(graph.stages[-1]) == folder.program(folder.stages[-1])
        assert graph.size == folder.size


def test_a_part_of_a_bundle_names_the_bundle(written: tuple[CompiledGraph, Path], tmp_path: Path) -> None:
    above = written[1] / "rank0"
    name = written[0].name
    below = shutil.make_archive(str(tmp_path / "below"), "zip", above)
    for place in (above, Path(below)):
        with pytest.raises(BundleError, match="is one graph of a bundle") as caught:
            bundle.open(place / name)
        assert caught.value.fix == f"name {place}, and this graph with --graph {name}"
    with pytest.raises(BundleError) as caught:
        bundle.open(shutil.make_archive(str(tmp_path / "graph"), "zip", above / name))
    assert caught.value.fix == "name the folder above it"
    with pytest.raises(BundleError, match="is a file, and no zip") as caught:
        bundle.open(above / "bundle.json")
    assert caught.value.fix == f"name the folder that it lies in, {above}"


def test_the_report_says_where_and_how_large(written: tuple[CompiledGraph, Path]) -> None:
    compiled, folder = written
    assert f"dumped to {folder / 'rank0' / compiled.name}, " in str(compiled)
    assert compiled.dumped.endswith(" KiB")


def changed(folder: Path, file: str, *, old: str, new: str) -> Bundle:
    path = next(folder.rglob(file))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return bundle.open(folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("bundle.json", '"format": 1', '"format": 2'),
        ("bundle.json", '"rank": 0', '"rank": 0, "run": "it"'),
        ("stages.jsonl", '"program":"00_lowered"', '"program":"../../../00_lowered"'),
        ("graph.json", '"started":', '"begun":'),
        ("plan.json", '"cache": ""', '"cache": 3'),
        ("00_lowered.json", '"target":"aten.', '"target":"os.system;aten.'),
    ],
)
def test_a_spoiled_file_is_refused(
    written: tuple[CompiledGraph, Path], tmp_path: Path, file: str, old: str, new: str
) -> None:
    shutil.copytree(written[1], tmp_path / "copy")
    spoiled = changed(tmp_path / "copy", file, old=old, new=new)
    with pytest.raises(BundleError, match=f"{file} is no part of a bundle that can be read"):
        [(spoiled.header, graph.stages, graph.plan, graph.program(graph.stages[0])) for graph in spoiled.graphs]


def test_what_a_crash_cut_off_is_left_out(
    written: tuple[CompiledGraph, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(written[1], tmp_path / "copy")
    file = next((tmp_path / "copy").rglob("stages.jsonl"))
    whole = bundle.open(written[1]).graph().stages
    file.write_bytes(file.read_bytes()[:-40])
    graph = bundle.open(tmp_path / "copy").graph()
    assert graph.stages == whole[:-1]
    missing = f"the stages behind {whole[-2].name} are missing: stages.jsonl ends in the middle of a line"
    assert (graph.incomplete, bundle.open(written[1]).graph().incomplete) == (missing, "")
    assert f"  incomplete: {missing}" in show.pipeline(graph).splitlines()
    assert "incomplete" not in show.pipeline(bundle.open(written[1]).graph())
    for place, told in ((tmp_path / "copy", [missing]), (written[1], [])):
        assert main(["show", str(place), "--json"]) == 0
        parts = json.loads(capsys.readouterr().out)
        assert [part["error"] for part in parts if part.get("name") == "incomplete"] == told
    assert page.data_of(bundle.open(tmp_path / "copy"))["graphs"][0]["stages"][-1]["error"] == missing
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    ended = bundle.open(tmp_path / "copy").graph().incomplete
    assert ended == f"the stages behind {whole[1].name} are missing: the process ended while it compiled"


def test_there_is_one_bundle_or_a_message(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle at"):
        bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"holds no bundle[\s\S]*did the process compile anything"):
        bundle.open(tmp_path)
    with pytest.raises(BundleError, match="the path of the bundle is empty"):
        bundle.open("")
    (tmp_path / "a.zip").write_bytes(b"PK, but no zip")
    with pytest.raises(BundleError, match=r"a\.zip is a file, and no zip"):
        bundle.open(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as out:
        out.writestr("rank0/bundle.json", "{}")
        out.writestr("rank1/bundle.json", "{}")
    with pytest.raises(BundleError, match="holds 2 bundles"):
        bundle.open(tmp_path / "b.zip")
    with pytest.raises(BundleError, match=r"bundle\.json is no part .* format: Field required"):
        bundle.open(tmp_path / "b.zip" / "rank1").header  # noqa: B018


@pytest.mark.parametrize("which", ["call", "all"])
def test_inputs_are_kept_if_asked_for(which: str, tmp_path: Path) -> None:
    _, graph = dumped(tmp_path, 3, dump_inputs=which)
    assert graph.inputs is not None
    kept = [entry for entry in graph.inputs.inputs if isinstance(entry, SavedTensor)]
    shapes = sorted(entry.shape for entry in kept)
    assert shapes == [(3, 16), (3, 16)] if which == "call" else [(3, 16), (3, 16), (16,), (64, 16)]
    assert len(graph.inputs.left_out) == (2 if which == "call" else 0)
    assert 3 in graph.inputs.inputs
    assert any(piece.view(torch.float32).eq(0.625).all() for piece in graph.tensors().values())
    with pytest.raises(OptionError, match="dump_inputs='cal' is unknown"):
        Options.of({"dump_inputs": "cal"})


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no bundle can be written in"):
        dumped(tmp_path / "file" / "below", 3)


def test_a_dump_that_can_not_go_on_ends_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def remove(module: fx.GraphModule, record: PassRecord) -> None:
        shutil.rmtree(next(tmp_path.glob("rank0/graph_*")))

    with caplog.at_level(logging.WARNING), pytest.raises(BundleError):
        dumped(tmp_path, 3, passes=[Pass("remove", "any", remove, after="swiglu")])
    (warning,) = [record for record in caplog.records if "ends here" in record.message]
    assert "No such file" in warning.message


def test_an_error_is_written_with_the_stage_before_it(tmp_path: Path) -> None:
    def fail(module: fx.GraphModule, record: PassRecord) -> None:
        raise ZeroDivisionError("in a user's pass")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        dumped(tmp_path, 3, passes=[Pass("fail", "any", fail, after="swiglu")])
    graph = bundle.open(tmp_path).graph()
    assert [stage.name for stage in graph.stages][-2:] == ["swiglu", "failed"]
    what, *lines = graph.stages[-1].error.splitlines()
    said, _, line = what.partition(" (")
    assert said == "behind swiglu: PassError: pass 'fail' failed: ZeroDivisionError: in a user's pass"
    assert re.fullmatch(r"\S*test_bundle.py:\d+\)", line)
    assert any("disabled_passes" in line for line in lines)
    assert graph.plan is None


CRASH = """
import os, signal, torch
from npu_compiler import Pass

def die(module, record):
    os.kill(os.getpid(), signal.SIGKILL)

passes = [Pass("die", "any", die, after="add_rms_norm")] if os.environ.get("DIE") else []
run = torch.compile(lambda x: x.relu() + 1, backend="ascend", options={"passes": passes})
run(torch.rand(3).npu())
run(torch.rand(3).npu())
"""


def test_processes_have_bundles_of_their_own_and_a_crash_leaves_what_came_before(tmp_path: Path) -> None:
    settings = {**os.environ, "NPU_COMPILER_DUMP": str(tmp_path), "RANK": "1", "WORLD_SIZE": "2"}
    die = {**settings, "DIE": "1"}
    running = [subprocess.Popen([sys.executable, "-c", CRASH], env=given, cwd=ROOT) for given in (settings, die)]
    assert [process.wait(timeout=120) for process in running] == [0, -9]
    found = bundle.all_of(tmp_path)
    assert sorted(item.place.name for item in found) == ["rank1", "rank1.1"]
    assert [(item.header.environment.rank, item.header.environment.ranks) for item in found] == [(1, 2)] * 2
    ends = sorted((graph.stages[-1].name, len(graph.captures)) for item in found for graph in item.graphs)
    assert ends == [("add_rms_norm", 0), ("final", 1)]
    with pytest.raises(BundleError, match=r"holds 2 bundles[\s\S]*rank1\.1"):
        bundle.open(tmp_path)


def test_without_a_dump_nothing_of_it_is_imported() -> None:
    code = CRASH + "\nimport sys; print([m for m in sys.modules if 'pydantic' in m or 'npu_compiler.inspect' in m])"
    settings = {name: text for name, text in os.environ.items() if name not in ("NPU_COMPILER_DUMP", "DIE")}
    ran = subprocess.run([sys.executable, "-c", code], env=settings, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr


def test_reading_takes_neither_torch_nor_the_model(written: tuple[CompiledGraph, Path]) -> None:
    code = (
        "import sys; from npu_compiler.inspect import bundle; graph = bundle.open(sys.argv[1]).graph();"
        "print(len([graph.python(stage) for stage in graph.stages])); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, written[1]], cwd=ROOT, capture_output=True, text=True)
    stages = bundle.open(written[1]).graph().stages
    assert ran.stdout.split() == [str(len(stages)), "False"], ran.stderr


def test_equal_layers_are_counted(tmp_path: Path) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.relu(block(x)) + x
            return x

    backend = AscendBackend()
    run = torch.compile(Layers().npu(), backend=backend, dynamic=False, options={"dump": str(tmp_path)})
    with torch.inference_mode():
        run(torch.rand(2, 4).npu())
    graph = bundle.open(tmp_path).graph()
    stages = {stage.name: stage for stage in graph.stages}
    assert stages["lowered"].calls == stages["lowered"].calls_of_all
    assert stages["noop"].calls < stages["noop"].calls_of_all
    assert stages["layers_once"].calls == stages["layers_once"].calls_of_all == stages["dead_code"].calls_of_all
    assert [fire.rule for fire in stages["layers_once"].fired] == ["layers_once: 8 equal layers, 4 compiled"]
