"""Ranks that die, come late or differ while a captured program runs: scenarios for tests/ranks.py.

Each ends in the error that it provokes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.compiler.rank_checks import RANK, RANKS, compiled, layer, operands
from tests.ranks import main

CULPRIT = RANKS - 1
ROWS = 6
LATE_SECONDS = 8.0


def steps(**options: object) -> Callable[[int], None]:
    """Calls a layer of two sums as often as it is told; from the second call on these are replays."""
    run, _ = compiled(layer, **options)
    given: list[Tensor] = [item.npu() for item in operands(ROWS)]

    def step(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                run(*given)
                torch.npu.synchronize()

    return step


def scenario_killed() -> None:
    """The last rank is killed while it runs replays, wherever it is in one."""
    step = steps()
    step(20)
    if RANK == CULPRIT:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    step(1_000_000)


def scenario_late_step() -> None:
    """The last rank stays away from one step for longer than HCCL_EXEC_TIMEOUT."""
    step = steps()
    step(20)
    if RANK == CULPRIT:
        time.sleep(LATE_SECONDS)
    step(20)


def scenario_late_start() -> None:
    """The last rank comes to the first collective after the time to join has passed."""
    if RANK == CULPRIT:
        time.sleep(LATE_SECONDS)
    torch.distributed.all_reduce(torch.ones(4).npu())
    torch.npu.synchronize()


def scenario_other_options() -> None:
    """The last rank compiles with sequence parallelism, the others without."""
    steps(**({"sequence_parallel": 1} if RANK == CULPRIT else {}))(20)


def scenario_not_compiled() -> None:
    """The last rank calls the layer as it is."""
    if RANK < CULPRIT:
        steps()(20)
        return
    for _ in range(20):
        layer(*(item.npu() for item in operands(ROWS)))
        torch.npu.synchronize()


if __name__ == "__main__":
    if RANK == CULPRIT:
        Path(sys.argv[1], "pid").write_text(str(os.getpid()))
    main(globals())
