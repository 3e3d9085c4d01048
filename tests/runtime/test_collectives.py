"""torch.distributed with backend "hccl" of the unmodified torch_npu: two processes against torch on the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import ranks

MODULE = "tests.runtime.process_group_checks"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ranks.Reports:
    return ranks.start(MODULE, tmp_path_factory.mktemp("process_group"))


@pytest.mark.parametrize("check", ranks.checks(MODULE))
def test_process_group(check: str, reports: ranks.Reports) -> None:
    ranks.passed(check, reports)


def test_dead_peer_is_a_runtime_error_that_names_it(tmp_path: Path) -> None:
    begin = time.monotonic()
    (survivor, errors), (dead, _) = ranks.start(MODULE, tmp_path, "dead_peer")
    assert dead == {}
    assert "rank 1 (pid " in survivor["error"] and "is dead" in survivor["error"], survivor["error"] + errors[-2000:]
    assert time.monotonic() - begin < 120, "HCCL_EXEC_TIMEOUT is 1836 s: the death itself must be noticed"


def test_mismatch_is_a_runtime_error_on_both_ranks(tmp_path: Path) -> None:
    for results, errors in ranks.start(MODULE, tmp_path, "mismatch"):
        assert "count 8" in results["error"] and "count 9" in results["error"], results["error"] + errors[-2000:]
