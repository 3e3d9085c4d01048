"""The examples of the pages on the compiler run as they are printed."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from npu_compiler import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "compiler.md"
COMPILER = (
    "[4096, 74752, 12583936]",
    "2 streams, estimated 16.5 us instead of 25.6",
    "fired add_rms_norm",
    "fired swiglu",
    "2 replays",
    "captured static",
    "weights: 1 in FRACTAL_NZ, 256 KiB before and 256 KiB after",
    "return (x * 2).cpu() + 1",
    "runs on aclnnAddRmsNorm and aclnnAdd\nnot on vllm-ascend's npu_add_rms_norm_bias: _C_ascend::",
)
PASSES = (
    "fired sigmoid_to_silu (2 nodes, saves 1 kernels and 384 bytes)",
    "pass broken broke the program",
    "dtypes torch.float64 and torch.float32",
)


CAPTURE = (
    *("30 graphs 1.4% padding", "[7, 41, 100]", "[16, 32, 48, 64]\n[31, 64]", "evicted s", "2 replays"),
    *("(first shape)", " 3 -> 4)", "11 tokens; 5 replays", "output 0 of an earlier call is still in use"),
    *("budget: 2 of 3 sizes fit", "of 48 MiB", "does not fit: ", "=256, ", "capture_budget_mib is 48"),
)
INSPECT = (
    *("swiglu              1 rewrites", "aclnnAddRmsNorm", "static: first shape", "as the compiled function: True"),
    "# npu_fused.add_rms_norm.default stands for 7 calls",
    *(
        "which pow_1 (aten.pow.Tensor_Scalar) leads to, is not 2, which the rule has there",
        "options: reorder\n  - True",
    ),
)
BISECT = (
    *("as eager: False", "pass: user_rules\nrule: gated; without it everything is right\n", "the lowered program by"),
    *(
        "silu_1, mul_5 became cat_default_1, swiglu_default_1",
        "torch.ops.aten.silu.default(",
        "before: wrong and after: right",
    ),
)
RUNS = (
    "4 of 6 calls: first call of a shape, before its capture\n  change: nothing: one call a shape",
    *("moved in memory, once, ", ": cache 0x", "called again after its graph was driven out, once, "),
    *("tensors on npu:0: 0.names (8, 4)\n  where: 0 at ", "example.py:36: return x @ self.table.T, self.names + 1"),
)
TRACE = ("critical path: ", "['step ", " swiglu_default\n")
WATCH = ("watch graph_", ": gate at ", " of 64", "tensor([[", ": first ", " NaN of 32 at ", "torch.Size([4, 8])")
FACTS = ("3*s = 24*k_s + 24 is a multiple of 8; s = 8*k, >= 8", "Truth.UNKNOWN")


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("compiler.md", COMPILER),
        ("passes.md", PASSES),
        ("facts.md", FACTS),
        ("capture.md", CAPTURE),
        ("inspect.md", INSPECT),
        ("page.md", ("one file of ", "added add_rms_norm_default", " tasks, ")),
        ("bisect.md", BISECT),
        ("runs.md", RUNS),
        ("trace.md", TRACE),
        ("watch.md", WATCH),
        ("parallel.md", ("group '0' has one rank",)),
        ("moe.md", ("MC2 (A2: at most 24 experts a rank, 16 ranks or more, it fits)",)),
        ("placements.md", ("torch.Size([16, 128])\nFalse\n",)),
        (
            "eplb.md",
            (
                "[0, 3, 4, 2, 1, 1, 5, 5]\n",
                "1.00, had they stayed in linear placement 1.60\n",
                "(3, 0, 2)) [60.0, 60.0] [Move(source=2, target=5)]",
            ),
        ),
        ("token_drop.md", ("[0.0, 1.0, 2.0, 3.0] [0, 1, 2, 0]\n[[0, -1], [1, -1], [2, -1], [3, -1]]\n[[1.0, 0.0]",)),
    ],
)
def test_examples(page: str, expected: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    file = tmp_path / "example.py"
    file.write_text("\n".join(blocks))  # a real file, so that messages can show its lines
    with torch.enable_grad():
        runpy.run_path(str(file), run_name="example")
    printed = capsys.readouterr().out
    for part in expected:
        assert part in printed


def test_printed_report_is_as_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    code, report = (re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)[0] for kind in ("python", "text"))
    file = tmp_path / "example.py"
    file.write_text(code)
    with torch.enable_grad():
        runpy.run_path(str(file), run_name="example")
    printed = _without_times(capsys.readouterr().out).replace(f"{tmp_path}/", "")
    for line in report.splitlines():
        assert _without_times(line).removesuffix("...") in printed


def test_the_rule_of_the_page_is_checked_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (DOCS / "passes.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    (said,) = re.findall(r"```console\n\$ npu-compiler check-rule gates:SILU\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "gates.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "gates", raising=False)  # another page's
    with torch.enable_grad():
        assert cli.main(["check-rule", "gates:SILU"]) == 0
    printed = capsys.readouterr().out
    errors = re.compile(r"error [\d.e-]+ of")
    assert errors.sub("error", said) in errors.sub("error", printed)


def _without_times(text: str) -> str:
    return re.sub(r"graph_\d+", "graph_0", re.sub(r"[\d.]+ ms", "- ms", text)).replace("  ...", "")


def test_page_names_every_option_and_pass() -> None:
    import dataclasses

    from npu_compiler import errors
    from npu_compiler.config import Options
    from npu_compiler.passes import pipeline

    text = PAGE.read_text()
    for name in (*(field.name for field in dataclasses.fields(Options)), *pipeline.names()):
        assert f"`{name}`" in text
    for kind in errors.NpuCompilerError.__subclasses__():
        assert f"`{kind.__name__}`" in text
