"""libhccl by itself: every entry point against numpy, with 2 and 3 processes, and everything that must fail."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime import hccl_checks
from tests.runtime.hccl_library import E_PARA, E_REMOTE, E_TIMEOUT, OPS, TYPES, Rank

REPOSITORY = Path(__file__).parents[2]
CHECKS = [name for name in vars(hccl_checks) if name.startswith("check_")]
TIMEOUT_CODE, MISMATCH_CODE = 507048, 507049


def start(folder: Path, rank: int, ranks: int, *scenario: str, **settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.runtime.hccl_checks", str(folder), str(rank), str(ranks), *scenario]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE)


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    ended = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        ended.append((process.returncode, errors))
    return ended


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What every rank reports, by check."""
    folder = tmp_path_factory.mktemp("hccl")
    ranks = request.param
    for code, errors in finish([start(folder, rank, ranks) for rank in range(ranks)]):
        assert code == 0, errors
    return [json.loads((folder / f"results.{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("check", CHECKS)
def test_check(check: str, results: list[dict[str, str]]) -> None:
    for rank, found in enumerate(results):
        assert found[check] == "", f"rank {rank}: {found[check]}"


def outcomes(folder: Path, scenario: str, ranks: int = 2, **settings: str) -> list[dict[str, Any]]:
    """How each rank's scenario ended; an empty outcome for a rank that was gone before the end."""
    finish([start(folder, rank, ranks, scenario, **settings) for rank in range(ranks)])
    files = [folder / f"outcome.{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def test_dead_peer_is_named_at_once(tmp_path: Path) -> None:
    survivor, dead, other = outcomes(tmp_path, "dead_peer", ranks=3)
    assert dead == {}
    for outcome in (survivor, other):
        assert outcome["code"] == TIMEOUT_CODE
        assert "rank 1 (pid " in outcome["message"] and "is dead" in outcome["message"]
        assert outcome["async_error"] == E_REMOTE
        assert outcome["seconds"] < 30, "the default timeout is 1836 s: the death itself must be noticed"


def test_late_peer_is_named_after_the_timeout(tmp_path: Path) -> None:
    waiting, late = outcomes(tmp_path, "late_peer", HCCL_EXEC_TIMEOUT="2")
    assert waiting["code"] == TIMEOUT_CODE and waiting["async_error"] == E_TIMEOUT
    assert "HCCL_EXEC_TIMEOUT" in waiting["message"] and "rank 1 (pid " in waiting["message"]
    assert 2 <= waiting["seconds"] < 30
    # The late rank learns that the communicator has failed, and why.
    assert late["code"] == TIMEOUT_CODE and "HCCL_EXEC_TIMEOUT" in late["message"]


def test_peer_that_destroys_the_communicator_is_named(tmp_path: Path) -> None:
    waiting, gone = outcomes(tmp_path, "peer_destroys")
    assert waiting["code"] == TIMEOUT_CODE and "destroyed the communicator" in waiting["message"]
    assert "rank 1" in waiting["message"]
    assert gone["code"] == 0


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("other_count", ["count 16", "count 17", "rank 0", "rank 1"]),
        ("other_operation", ["HcclAllReduce", "HcclBarrier", "rank 0", "rank 1"]),
        ("all_to_all_counts", ["16 bytes", "12 bytes", "rank 1"]),
        ("message_size", ["32 bytes", "20 bytes", "rank 0", "rank 1"]),
    ],
)
def test_mismatch_names_both_sides(scenario: str, said: list[str], tmp_path: Path) -> None:
    for outcome in outcomes(tmp_path, scenario):
        assert outcome["code"] == MISMATCH_CODE
        assert all(part in outcome["message"] for part in said), outcome["message"]


def test_rank_that_never_joins_is_named(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").glob("npu_compiler_hccl_*"))
    begin = time.monotonic()
    [(code, errors)] = finish([start(tmp_path, 0, 2, NPU_COMPILER_HCCL_CONNECT_SECONDS="2")])
    assert code != 0
    assert "rank 1 (never joined)" in errors and "HCCL_CONNECT_TIMEOUT" in errors, errors
    assert f": {E_TIMEOUT}: " in errors
    assert 2 <= time.monotonic() - begin < 60
    assert set(Path("/dev/shm").glob("npu_compiler_hccl_*")) <= before


@pytest.mark.parametrize("setting", ["HCCL_CONNECT_TIMEOUT=30", "HCCL_EXEC_TIMEOUT=-1", "HCCL_EXEC_TIMEOUT=soon"])
def test_settings_outside_the_documented_range_are_refused(setting: str, tmp_path: Path) -> None:
    name, value = setting.split("=")
    [(code, errors)] = finish([start(tmp_path, 0, 1, **{name: value})])
    assert code != 0 and setting in errors and f": {E_PARA}: " in errors, errors


def test_one_process_can_hold_all_ranks() -> None:
    """HcclCommInitAll: one communicator per device of this process."""
    me = Rank(0, 2)
    comms, devices = (ctypes.c_void_p * 2)(), (ctypes.c_int32 * 2)(0, 1)
    me.call("HcclCommInitAll", 2, devices, comms)
    streams = [me.stream, ctypes.c_void_p()]
    me.check("aclrtCreateStream", me.acl.aclrtCreateStream(ctypes.byref(streams[1])))
    parts = [np.full(5, rank + 1, np.float32) for rank in range(2)]
    for rank in range(2):
        kind, op = TYPES["float32"], OPS["sum"]
        me.call("HcclAllReduce", parts[rank], parts[rank], ctypes.c_uint64(5), kind, op,
                ctypes.c_void_p(comms[rank]), streams[rank])  # fmt: skip
    for stream in streams:
        me.check("aclrtSynchronizeStream", me.acl.aclrtSynchronizeStream(stream))
    for part in parts:
        assert part.tolist() == [3] * 5
    for comm in comms:
        me.call("HcclCommDestroy", ctypes.c_void_p(comm))


def test_too_little_shared_memory_is_said_while_joining(tmp_path: Path) -> None:
    """In a container /dev/shm may be small; touching a page too many would kill the process with SIGBUS."""
    rank = f"{sys.executable} -m tests.runtime.hccl_checks {tmp_path} 0 1"
    script = f"mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec {rank}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    ended = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=120)
    if ended.returncode == 77 or "unshare failed" in ended.stderr:
        pytest.skip("this machine does not let a process mount its own /dev/shm")
    assert ended.returncode == 1 and "/dev/shm has 1 MiB free" in ended.stderr, ended.stderr
