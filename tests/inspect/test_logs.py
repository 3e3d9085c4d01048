"""What a compilation shows while it works: TORCH_LOGS, TORCH_TRACE, depyf's dump, the printed pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npu_compiler.backend import AscendBackend

PROGRAM = """
import sys, depyf, torch
from torch.nn.functional import silu

def gate(x, weight):
    first, second = (x @ weight).chunk(2, dim=-1)
    return silu(first) * second

arguments = torch.rand(4, 8).npu(), torch.rand(8, 16).npu()
with depyf.prepare_debug(sys.argv[1]), torch.inference_mode():
    run = torch.compile(gate, backend="ascend", options={"print_pipeline": True})
    found = [run(*arguments) for _ in range(2)]
torch.testing.assert_close(found[0].cpu(), gate(*(argument.cpu() for argument in arguments)))
torch.testing.assert_close(found[0], found[1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything on: `errors` has what it wrote to standard error, `trace` and `depyf` are folders."""
    place = tmp_path_factory.mktemp("logs")
    (place / "program.py").write_text(PROGRAM)
    settings = {
        **{name: text for name, text in os.environ.items() if name != "NPU_COMPILER_DUMP"},
        "TORCH_LOGS": "+ascend",
        "TORCH_TRACE": str(place / "trace"),
    }
    ran = subprocess.run(
        [sys.executable, place / "program.py", place / "depyf"], env=settings, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (place / "errors").write_text(ran.stderr)
    return place


def test_the_log_tells_passes_plan_and_captures(place: Path) -> None:
    logged = [line.partition("] ")[2] for line in (place / "errors").read_text().splitlines() if line[:1] in "VI"]
    text = "\n".join(logged)
    assert "===== ascend lowered =====" in text and "torch.ops.aten.silu.default" in text
    assert re.search(r"fired swiglu .*program\.py:7: return silu\(first\) \* second", text)
    assert "torch.ops.npu_fused.swiglu.default" in text
    assert re.search(r"compiled graph_0 \(.*\): 1 rewrites", text)
    assert "swiglu x1: aclnnSwiGlu" in text
    assert re.search(r"graph_0 \(.*\): captured static: 2 calls, .* \(first shape\)", text)


def test_the_pipeline_is_printed_as_show_prints_it(place: Path) -> None:
    text = (place / "errors").read_text()
    printed = text[text.index("\ngraph_0 (print_pipeline=True)\n") :]
    order = ["  lowered: ", "    fired swiglu: ", "  final: 2 calls", "  swiglu x1: aclnnSwiGlu", "  compiled in "]
    assert [printed.index(line) for line in order] == sorted(printed.index(line) for line in order)


def test_stages_are_artifacts_of_the_structured_trace(place: Path) -> None:
    (file,) = (place / "trace").iterdir()
    names, programs = [], {}
    for line in file.read_text().splitlines():
        if line.startswith("V") and '"artifact"' in line:
            about = json.loads(line[line.index("{") :])
            names.append(about["artifact"]["name"])
            assert about.get("frame_id") == 0 or not names[-1].startswith("ascend_")
        elif line.startswith("\t") and names:
            programs[names[-1]] = programs.get(names[-1], "") + line[1:] + "\n"
    ours = [name for name in names if name.startswith("ascend_")]
    assert ours[0] == "ascend_graph_0_00_lowered" and ours[-1].endswith("_swiglu")
    assert len(ours) == len({programs[name].partition("\n")[2] for name in ours}), "each program once"
    module = {"__file__": "", "__name__": "artifact"}
    exec(programs[ours[-1]], module)
    assert "npu_fused.swiglu" in programs[ours[-1]]
    (result,) = module["program"](*module["inputs"]())
    assert result.shape == (4, 8)


def test_depyf_gets_the_programs_and_the_code_of_the_function(place: Path) -> None:
    files = {file.name.partition(".")[2]: file.read_text() for file in (place / "depyf").iterdir()}
    assert "torch.ops.aten.silu.default" in files["ascend_lowered.0.py"]
    assert "torch.ops.npu_fused.swiglu.default" in files["ascend_final.0.py"]
    assert any(file.name.startswith("full_code_for_gate") for file in (place / "depyf").iterdir())


def test_the_variable_prints_too_and_an_error_is_printed_with_what_came_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU_COMPILER_PRINT_PIPELINE", "1")
    run = torch.compile(lambda x: torch.relu(x).item(), backend=AscendBackend(), fullgraph=False)
    run(torch.ones(1).npu())
    assert "graph_0\n  lowered: " in capsys.readouterr().err
    monkeypatch.setenv("NPU_COMPILER_PRINT_PIPELINE", "0")
    torch._dynamo.reset()
    run(torch.ones(1).npu())
    assert "graph_0" not in capsys.readouterr().err
