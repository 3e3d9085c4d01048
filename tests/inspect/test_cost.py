"""What a dump costs where it must cost nothing: a replay. (Without the switch nothing of inspect is imported:
test_bundle.py. What a compilation costs with it: `python -m benchmarks dump`.)"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import npu_compiler
from npu_compiler.inspect import bundle
from npu_compiler.inspect.why_eager import why_eager

SOURCES = str(Path(npu_compiler.__file__).parents[1])


def step(x: Tensor, cache: Tensor) -> Tensor:
    cache.add_(x)
    return torch.relu(cache) * 2


def functions_of_a_replay(**options: Any) -> list[tuple[str, str, int]]:
    """The project's functions that one replay calls, in order: file, name, line."""
    torch._dynamo.reset()
    run = torch.compile(step, backend="ascend", options=options)
    x, cache = torch.ones(4).npu(), torch.zeros(4).npu()
    found: list[tuple[str, str, int]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SOURCES) and code.co_filename != __file__:
            found.append((code.co_filename, code.co_qualname, code.co_firstlineno))

    with torch.inference_mode():
        for _ in range(3):
            run(x, cache)
        sys.setprofile(note)
        try:
            result = run(x, cache)
        finally:
            sys.setprofile(None)
    assert result.cpu().tolist() == [8.0] * 4
    return found


def test_a_replay_calls_the_same_functions_with_a_dump_as_without(tmp_path: Path) -> None:
    plain = functions_of_a_replay()
    assert any(name == "Replayer._replay" for _, name, _ in plain)
    assert not [file for file, _, _ in plain if "/inspect/" in file]
    assert functions_of_a_replay(dump=str(tmp_path)) == plain
    torch._dynamo.reset()
    assert len(bundle.open(tmp_path).graph().captures) == 1
    assert sum(entry.count for entry in why_eager(tmp_path)) == 1
