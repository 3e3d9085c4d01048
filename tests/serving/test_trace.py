"""One engine, looked into: timelines of its steps, and what a layer's module gave in each of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from npu_compiler.fusion_kernels.watched import Seen
from npu_compiler.inspect.timeline import read, tasks_of, timeline
from npu_compiler.serving.options import ServingOptions
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs

PROMPT, TOKENS = 1, 8
SHORT = [[3, 5, 7], [11, 13], [17, 19, 23, 29]]


@torch.inference_mode()
def mlp_of_transformers(folder: Path, tokens: list[int]) -> torch.Tensor:
    """What the second layer's MLP gives for each token, [tokens, hidden]."""
    model = oracle.model(folder)
    found: list[torch.Tensor] = []
    hook = model.get_submodule("model.layers.1.mlp").register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0].clone())
    )
    try:
        model(torch.tensor([tokens]))
    finally:
        hook.remove()
    return found[0]


def test_an_engine_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints.cached(checkpoints.Shape(family="qwen3"))
    prompt = oracle.prompts()[PROMPT]
    settings = {
        **graphs("FULL_DECODE_ONLY", [1, 4]),
        "profiler_config": {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "asked")},
        "additional_config": {
            "trace_dir": str(tmp_path / "steps"),
            "trace_steps": [3, 5],
            "compile": {"watch": ["layers.1.mlp:values", "*:nan"], "watch_save": str(tmp_path / "saved")},
        },
    }
    with engine(folder, **settings) as llm:
        assert llm.collective_rpc("watched") == [[]]  # the warm-up and the captures are nobody's steps
        capsys.readouterr()
        tokens = generate(llm, [prompt], TOKENS)[0]
        check_watched(llm.collective_rpc("watched")[0], mlp_of_transformers(folder, [*prompt, *tokens]), len(prompt))
        several = generate(llm, SHORT, TOKENS)
        printed = capsys.readouterr().out
        llm.start_profile()
        assert generate(llm, [prompt], TOKENS)[0] == tokens
        llm.stop_profile()
    assert tokens == oracle.greedy(folder, prompt, TOKENS)
    check_padded(folder, several, tmp_path / "saved" / "rank0" / "vllm", printed)
    (steps,), (asked,) = (list((tmp_path / name).iterdir()) for name in ("steps", "asked"))
    assert [step.count for step in timeline(steps).steps] and sum(step.count for step in timeline(steps).steps) == 3
    check_trace(asked)


def check_watched(found: list[Seen], expected: torch.Tensor, prompt: int) -> None:
    """A prefill of the prompt, then a replay for each further token."""
    assert [seen.shape[0] for seen in found] == [prompt, *[1] * (TOKENS - 1)]
    assert [seen.step for seen in found] == list(range(TOKENS))
    values = [seen.value for seen in found if seen.value is not None]
    torch.testing.assert_close(torch.cat(values), expected[: prompt + TOKENS - 1], rtol=1e-3, atol=1e-4)
    assert all("mlp" in seen.place for seen in found)


def check_padded(folder: Path, tokens: list[list[int]], saved: Path, printed: str) -> None:
    """Three requests in the graph of four: each decode step is printed and saved, without what the fourth row holds."""
    lines = [json.loads(line) for line in (saved / "notes.jsonl").read_text().splitlines()]
    padded = [line for line in lines if line["rows"] == 3 and line["shape"][0] == 4]
    first = TOKENS + 1  # steps before: those of the single request, and the prefill
    assert [line["step"] for line in padded] == list(range(first, first + TOKENS - 1))
    expected = [
        mlp_of_transformers(folder, [*prompt, *answer])[len(prompt) :]
        for prompt, answer in zip(SHORT, tokens, strict=True)
    ]
    for number, line in enumerate(padded):
        value = load_file(saved / line["file"])[line["key"]]
        wanted = torch.stack([each[number] for each in expected])
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)
        held = line["statistics"]
        assert held["count"] == wanted.numel() and held["largest"] == pytest.approx(float(wanted.max()), abs=1e-4)
        assert held["mean"] == pytest.approx(float(wanted.mean()), abs=1e-4)
        told = rf"^watch step {line['step']}: layers\.1\.mlp\S* at .*: [\w.]+, float32 \[3 of 4, {wanted.shape[1]}\] "
        assert re.search(told, printed, re.MULTILINE)
    assert "NaN" not in printed


def check_trace(file: Path) -> None:
    found = timeline(file)
    empty = "context_0(0)_generation_0(0)"  # the step behind the last one
    steps = [step for step in found.steps if not step.name.endswith(empty)]
    assert sum(step.count for step in steps) == TOKENS
    events = read(file)
    replays = [event for event in events if event.get("cat") == "replay"]
    assert len(replays) == TOKENS - 1
    replayed = [task for task in tasks_of(events) if task.said.get("pass") == "swiglu"]
    modules = [task.said["module"] for task in replayed]
    for layer in (0, 1):
        assert sum(f"layers.{layer}." in module for module in modules) == TOKENS


@pytest.mark.parametrize("steps", [[0, 3], [5, 4], [1], "all", [True, 3]])
def test_wrong_steps_are_refused(steps: object) -> None:
    with pytest.raises(ValueError, match="trace_steps must be the first and the last step"):
        ServingOptions.parse({"trace_dir": "x", "trace_steps": steps})
    with pytest.raises(ValueError, match="trace_dir must be a folder"):
        ServingOptions.parse({"trace_dir": 3})
