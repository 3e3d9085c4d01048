"""Random programs: eager equals compiled, at every stage of the pipeline, and captured and replayed.

A failure prints the program, as text and as a value, and hypothesis's @reproduce_failure line. The value goes into
test_found.py. `pytest --hypothesis-seed=N` repeats a whole run.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from npu_compiler.backend import AscendBackend
from npu_compiler.config import Options
from npu_compiler.passes import pipeline
from tests.properties.compare import SEED, Seen, check_all_stages
from tests.properties.programs import Program, programs, traced

PASS_NAMES = list(dict.fromkeys(pipeline.names(pipeline.selected(Options()))))
SCALE = int(os.environ.get("PROPERTY_SCALE", "1"))
"""How many times the default number of programs."""


def examples(count: int, fixed: bool) -> settings:
    """Settings for `count` programs: the same ones in every run, or new ones."""
    return settings(
        derandomize=fixed and SCALE == 1,
        max_examples=count * SCALE,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def check_stages(program: Program, dynamic: bool, without: list[str]) -> None:
    note(str(program))
    assert check_all_stages(program, dynamic, without) >= len(pipeline.PASSES)


def check_replay(program: Program, dynamic: bool) -> None:
    """Four calls with other values, captured at the first; then two with longer inputs."""
    note(str(program))
    torch._dynamo.reset()
    compiled = torch.compile(traced(program), backend=AscendBackend(), dynamic=dynamic, fullgraph=True)
    for call, more in enumerate((0, 0, 0, 0, 2, 2)):
        expected = Seen(program, program.arguments(SEED + call, more_rows=more))
        got = Seen(compiled, program.arguments(SEED + call, "npu", more_rows=more))
        got.assert_same(expected, f"call {call}, {more} more rows")


@examples(30, fixed=True)
@given(programs(), st.booleans(), st.lists(st.sampled_from(PASS_NAMES), min_size=2, max_size=2, unique=True))
def test_stages(program: Program, dynamic: bool, without: list[str]) -> None:
    check_stages(program, dynamic, without)


@examples(5, fixed=True)
@given(programs(max_steps=8), st.booleans())
def test_replay(program: Program, dynamic: bool) -> None:
    check_replay(program, dynamic)


@pytest.mark.full
@pytest.mark.timeout(7200)
@examples(3000, fixed=False)
@given(programs(max_steps=14), st.booleans())
def test_stages_of_thousands(program: Program, dynamic: bool) -> None:
    check_stages(program, dynamic, PASS_NAMES)


@pytest.mark.full
@pytest.mark.timeout(7200)
@examples(500, fixed=False)
@given(programs(max_steps=12), st.booleans())
def test_replay_of_hundreds(program: Program, dynamic: bool) -> None:
    check_replay(program, dynamic)
