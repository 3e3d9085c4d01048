"""Random programs: eager equals compiled, at every stage of the pipeline, and captured and replayed.

A failure prints the program, as text and as a value, and hypothesis's @reproduce_failure line. The value goes into
test_found.py. `pytest --hypothesis-seed=N` repeats a whole run; the seed of a run with new programs is printed too.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from hypothesis import strategies as st

from npu_compiler.backend import AscendBackend
from tests.properties.compare import SEED, Seen, Strides, check_all_stages, promised_strides
from tests.properties.draws import integers
from tests.properties.fragments import expected_to_fire, fragments
from tests.properties.programs import Program, alone, programs, traced
from tests.properties.seeded import PHASES

SCALE = float(os.environ.get("PROPERTY_SCALE", "1"))
"""How many times the default number of programs."""
seeds = st.lists(integers(0, 1 << 16), min_size=3, max_size=3, unique=True)
"""Of programs that return other values of the drawn one: each lowered program is four programs to the passes."""
FIRED: Counter[str] = Counter()
"""How often each rule fired in this file's tests so far."""


def examples(count: int, fixed: bool) -> settings:
    """Settings for `count` programs: the same ones in every run, or new ones."""
    return settings(
        derandomize=fixed and SCALE == 1,
        max_examples=max(1, round(count * SCALE)),
        database=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def check_stages(program: Program, dynamic: bool, other_outputs: Sequence[int]) -> None:
    if currently_in_test_context():
        note(str(program))
    check = check_all_stages(program, dynamic, other_outputs)
    assert check.compared
    FIRED.update(check.fired)


def check_replay(program: Program, dynamic: bool) -> None:
    """Four calls with other values, captured at the first; then two with longer inputs."""
    note(str(program))
    torch._dynamo.reset()
    compiled = torch.compile(traced(program), backend=AscendBackend(), dynamic=dynamic, fullgraph=True)
    for call, more in enumerate((0, 0, 0, 0, 2, 2)):
        expected = Seen(program, program.arguments(SEED + call, more_rows=more))
        exact = None
        if program.device != "cpu":
            exact = Seen(program.exact, program.arguments(SEED + call, more_rows=more, exact=True))
        got = Seen(compiled, program.arguments(SEED + call, "npu", more_rows=more))
        stage = f"call {call}, {more} more rows"
        promised = functools.partial(lowered_strides, program, more)
        got.assert_same(expected, stage, exact and (lambda: exact.values), promised)  # noqa: B023


def lowered_strides(program: Program, more: int) -> list[Strides]:
    """The outputs' strides on the device, of the calls that AOTAutograd makes of the program and as it infers them."""
    given = program.arguments(SEED, "npu", more_rows=more)
    lowered = torch.compile(traced(program), backend="aot_eager", dynamic=False, fullgraph=True)
    return [Seen(lowered, given).strides, promised_strides(program, program.arguments(SEED, "npu", more_rows=more))]


@examples(40, fixed=True)
@given(programs(), st.booleans(), seeds)
def test_stages(program: Program, dynamic: bool, other_outputs: list[int]) -> None:
    check_stages(program, dynamic, other_outputs)


@pytest.mark.parametrize("fragment", [name for name, one in fragments().items() if not one.miss])
def test_stages_with_each_rule(fragment: str) -> None:
    for dynamic in (False, True):
        check_stages(alone(fragment, fragments()[fragment].dtypes[0]), dynamic, [])


def test_the_device_gives_dense_results_where_torch_promises_others() -> None:
    """Why a compiled program may have other strides than eager on the device: those that its lowering promises."""
    left, right = torch.rand(2, 5, 4, 16).npu().transpose(1, 2), torch.rand(2, 1, 5, 16).npu()
    assert torch.mul(left, right).is_contiguous()
    assert promised_strides(torch.ops.aten.mul.Tensor, (left, right)) == [left.stride()]
    check_stages(alone("norm_rope_hugging_face", torch.bfloat16), True, [])


def test_every_rule_fired() -> None:
    """In the programs above; what never fires was never compared."""
    if not FIRED:
        pytest.skip("the tests above did not run")
    missing = expected_to_fire() - FIRED.keys()
    assert not missing, f"never fired: {sorted(missing)}; fired: {FIRED}"


@examples(5, fixed=True)
@given(programs(max_steps=8), st.booleans())
def test_replay(program: Program, dynamic: bool) -> None:
    check_replay(program, dynamic)


@pytest.mark.full
@pytest.mark.timeout(14400)
@examples(5000, fixed=False)
@given(programs(max_steps=14), st.booleans(), seeds)
def test_stages_of_thousands(program: Program, dynamic: bool, other_outputs: list[int]) -> None:
    check_stages(program, dynamic, other_outputs)


@pytest.mark.full
@pytest.mark.timeout(7200)
@examples(500, fixed=False)
@given(programs(max_steps=12), st.booleans())
def test_replay_of_hundreds(program: Program, dynamic: bool) -> None:
    check_replay(program, dynamic)
