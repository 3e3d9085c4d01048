"""Random programs that are the same in every run; `NPU_COMPILER_SEED=N` tries others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis.strategies import SearchStrategy

Numbers = TypeVar("Numbers")
"""What a program is made of."""
SEED = int(os.environ.get("NPU_COMPILER_SEED", "0"))
PHASES = (Phase.generate, Phase.shrink)
"""Without `explain`: it traces every line of torch, and a failure takes minutes; the shrunk program is a value."""


def try_all(
    check: Callable[[Numbers], None],
    programs: SearchStrategy[Numbers],
    count: int,
    number: int,
    suppress: Sequence[HealthCheck] = (),
) -> None:
    """Calls `check` with `count` of the programs. A failure prints the seed and hypothesis's @reproduce_failure line.

    Args:
        number: calls with different ones try different programs.
        suppress: health checks that do not apply, beside those on time and size.
    """

    @seed(SEED * 1000 + number)
    @settings(
        max_examples=count,
        database=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, *suppress],
    )
    @given(programs)
    def run(numbers: Numbers) -> None:
        note(f"NPU_COMPILER_SEED={SEED}")
        check(numbers)

    with torch.no_grad():
        run()
