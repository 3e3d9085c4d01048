"""The examples of docs/standalone.md, and the example files it names, run as they are printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from examples import compile_a_model, generate_with_transformers

PAGE = Path(__file__).parents[2] / "docs" / "standalone.md"


def test_examples_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    file = tmp_path / "example.py"
    file.write_text("\n".join(blocks))  # a real file, so that messages can show its lines
    with torch.enable_grad():
        runpy.run_path(str(file), run_name="example")
    assert re.search(r"^  1[23] replays$", capsys.readouterr().out, flags=re.MULTILINE)


def test_compile_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    compile_a_model.main()
    printed = capsys.readouterr().out
    for part in (
        "counted on the device: 4",
        "fired add_rms_norm",
        "fired swiglu",
        "3 replays",
        "dropout with the same",
    ):
        assert part in printed


def test_generate_with_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["generate_with_transformers.py", "--tokens", "12"])
    generate_with_transformers.main()
    printed = capsys.readouterr().out
    assert printed.count("the same tokens") == 2
    assert "OTHER" not in printed
    assert re.search(r"^ +20 replays$", printed, flags=re.MULTILINE)
