"""A rank that dies, comes late or differs ends the others in time, with an error that names it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import ranks

MODULE = "tests.compiler.failing_ranks"
RANKS = 3
SCENARIOS = {
    "killed": "cannot finish: rank 2 (pid {pid}) is dead. Look for the error that ended it",
    "late_step": "waited 2 s (HCCL_EXEC_TIMEOUT) for rank 2 (pid {pid}), which is alive but has not come",
    "late_start": "rank 2 (never joined)",
    "other_options": "ranks 0 and 2 of group '0' planned different collectives: number 1 is ",
    "not_compiled": "rank 2 (pid {pid}) runs HcclAllReduce(count 192, float32, sum)",
}
"""What every other rank hears."""
IN_DEFAULT_RUN = ("killed", "other_options")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_DEFAULT_RUN else pytest.mark.full) for name in SCENARIOS]
)
def test_the_others_hear_who_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "2")
    monkeypatch.setenv("NPU_COMPILER_HCCL_CONNECT_SECONDS", "2")
    begin = time.monotonic()
    reports = ranks.start(MODULE, tmp_path, name, ranks=RANKS)
    assert time.monotonic() - begin < 100, "imports and compilation take a part of it, waiting a few seconds"
    pid = (tmp_path / "pid").read_text()
    for results, errors in reports[: RANKS - 1]:
        assert SCENARIOS[name].format(pid=pid) in results["error"], results["error"] + errors[-2000:]
    culprit, errors = reports[-1]
    if name == "killed":
        assert culprit == {}
    else:
        assert culprit["error"], f"the rank itself went on:\n{errors[-2000:]}"
