"""The checks that run inside rank processes: `python -m tests.runtime.hccl_checks FOLDER RANK RANKS [SCENARIO]`.

Without a scenario every `check_*` function runs on one communicator and `FOLDER/results.RANK.json` maps its name to
"" or to what went wrong. A scenario is one `scenario_*` function, which ends in an error on purpose.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.runtime.hccl_library import (
    E_NOT_SUPPORT,
    E_PARA,
    E_PTR,
    OPS,
    RECV,
    SEND,
    TYPES,
    HcclError,
    Rank,
    contribution,
    reduced,
    u64,
    wait_for_file,
)

REDUCIBLE = ["int8", "int16", "int32", "int64", "float16", "float32", "bfloat16"]
# One slot of a rank is 1 MiB: less, exactly one of float32, and several rounds with a rest.
SMALL = [1, 17]
COUNTS = [*SMALL, 1 << 18, (1 << 19) + 5]


def same(found: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Bit for bit."""
    if not np.array_equal(found, expected):
        wrong = np.flatnonzero(found != expected)
        raise AssertionError(f"{what}: {wrong.size} of {found.size} differ, first at {wrong[0]}")


def refused(me: Rank, code: int, name: str, *arguments: Any) -> str:
    """The message of a call that must be refused with `code`."""
    try:
        me.run(name, *arguments)
    except HcclError as error:
        assert error.code == code, f"{name} returned {error.code} instead of {code}: {error}"
        return str(error)
    raise AssertionError(f"{name} was not refused")


def allowed(type_name: str, op: str) -> bool:
    return not (op == "prod" and type_name in ("int16", "bfloat16"))


def counts(type_name: str) -> list[int]:
    """Long ones for one type of each size; the others differ only in the arithmetic."""
    return COUNTS if type_name in ("int8", "bfloat16", "float32", "int64") else SMALL


def check_all_reduce(me: Rank) -> None:
    for type_name in REDUCIBLE:
        for op in filter(lambda op: allowed(type_name, op), OPS):
            for count in COUNTS:
                mine = contribution(me.rank, count, type_name)
                out = np.empty_like(mine)
                me.run("HcclAllReduce", mine, out, ctypes.c_uint64(count), TYPES[type_name], OPS[op])
                same(out, reduced(me.ranks, count, type_name, op), f"{type_name} {op} {count}")


def check_all_reduce_in_place(me: Rank) -> None:
    for count in COUNTS:
        buffer = contribution(me.rank, count, "float32")
        me.run("HcclAllReduce", buffer, buffer, ctypes.c_uint64(count), TYPES["float32"], OPS["sum"])
        same(buffer, reduced(me.ranks, count, "float32", "sum"), str(count))


def check_all_reduce_has_one_order(me: Rank) -> None:
    """Sums that depend on the order of addition: the same bits on every rank, namely those of the rank order."""
    count = (1 << 18) + 3
    terms = [np.random.default_rng(r).standard_normal(count).astype(np.float32) * 10.0**r for r in range(me.ranks)]
    out = np.empty(count, np.float32)
    me.run("HcclAllReduce", terms[me.rank], out, ctypes.c_uint64(count), TYPES["float32"], OPS["sum"])
    expected = terms[0].copy()
    for term in terms[1:]:
        expected += term
    same(out, expected, "sum in rank order")


def check_integers_wrap(me: Rank) -> None:
    mine = np.full(33, 100, np.int8)
    out = np.empty_like(mine)
    me.run("HcclAllReduce", mine, out, ctypes.c_uint64(33), TYPES["int8"], OPS["sum"])
    wrapped = (100 * me.ranks + 128) % 256 - 128
    same(out, np.full(33, wrapped, np.int8), "int8 sum")


def check_reduce(me: Rank) -> None:
    for root in range(me.ranks):
        for count in COUNTS:
            mine = contribution(me.rank, count, "float16")
            out = np.full_like(mine, 77)
            me.run("HcclReduce", mine, out, ctypes.c_uint64(count), TYPES["float16"], OPS["max"], root)
            untouched = np.full_like(mine, 77)
            same(out, reduced(me.ranks, count, "float16", "max") if me.rank == root else untouched, f"{root} {count}")


def check_broadcast(me: Rank) -> None:
    for root in range(me.ranks):
        for type_name in TYPES:
            count = counts(type_name)[-1]
            buffer = contribution(me.rank, count, type_name)
            me.run("HcclBroadcast", buffer, ctypes.c_uint64(count), TYPES[type_name], root)
            same(buffer, contribution(root, count, type_name), f"{type_name} from {root}")


def check_all_gather(me: Rank) -> None:
    for type_name in TYPES:
        for count in counts(type_name):
            mine = contribution(me.rank, count, type_name)
            out = np.empty(count * me.ranks, mine.dtype)
            me.run("HcclAllGather", mine, out, ctypes.c_uint64(count), TYPES[type_name])
            expected = np.concatenate([contribution(r, count, type_name) for r in range(me.ranks)])
            same(out, expected, f"{type_name} {count}")


def check_all_gather_in_place(me: Rank) -> None:
    count = COUNTS[-1]
    out = np.zeros(count * me.ranks, np.float32)
    mine = out[me.rank * count : (me.rank + 1) * count]
    mine[:] = contribution(me.rank, count, "float32")
    me.run("HcclAllGather", mine, out, ctypes.c_uint64(count), TYPES["float32"])
    same(out, np.concatenate([contribution(r, count, "float32") for r in range(me.ranks)]), "in place")


def check_all_gather_v(me: Rank) -> None:
    sizes = [(1 << 18) * r + 3 for r in range(me.ranks)]
    starts = [sum(sizes[:r]) + 2 * r for r in range(me.ranks)]  # gaps of two elements
    out = np.full(sum(sizes) + 2 * me.ranks, -1, np.int32)
    expected = out.copy()
    for r in range(me.ranks):
        expected[starts[r] : starts[r] + sizes[r]] = contribution(r, sizes[r], "int32")
    mine = contribution(me.rank, sizes[me.rank], "int32")
    me.run("HcclAllGatherV", mine, ctypes.c_uint64(mine.size), out, u64(sizes), u64(starts), TYPES["int32"])
    same(out, expected, "uneven parts with gaps")


def check_reduce_scatter(me: Rank) -> None:
    for type_name in REDUCIBLE:
        for count in counts(type_name):
            whole = count * me.ranks
            mine = contribution(me.rank, whole, type_name)
            out = np.empty(count, mine.dtype)
            me.run("HcclReduceScatter", mine, out, ctypes.c_uint64(count), TYPES[type_name], OPS["sum"])
            expected = reduced(me.ranks, whole, type_name, "sum")[me.rank * count : (me.rank + 1) * count]
            same(out, expected, f"{type_name} {count}")


def check_reduce_scatter_v(me: Rank) -> None:
    sizes = [(1 << 18) * (me.ranks - r) + 1 for r in range(me.ranks)]
    starts = [sum(sizes[:r]) for r in range(me.ranks)]
    mine = contribution(me.rank, sum(sizes), "float32")
    out = np.empty(sizes[me.rank], np.float32)
    arguments = [mine, u64(sizes), u64(starts), out, ctypes.c_uint64(out.size), TYPES["float32"], OPS["min"]]
    me.run("HcclReduceScatterV", *arguments)
    whole = reduced(me.ranks, sum(sizes), "float32", "min")
    same(out, whole[starts[me.rank] : starts[me.rank] + out.size], "uneven parts")


def check_scatter(me: Rank) -> None:
    for root in range(me.ranks):
        for count in COUNTS:
            mine = contribution(me.rank, count * me.ranks, "int64")
            out = np.empty(count, np.int64)
            source = mine if me.rank == root else None
            me.run("HcclScatter", source, out, ctypes.c_uint64(count), TYPES["int64"], root)
            whole = contribution(root, count * me.ranks, "int64")
            same(out, whole[me.rank * count : (me.rank + 1) * count], f"from {root}, {count}")


def check_all_to_all(me: Rank) -> None:
    for type_name in TYPES:
        for count in counts(type_name):
            mine = contribution(me.rank, count * me.ranks, type_name)
            out = np.empty_like(mine)
            kind = TYPES[type_name]
            me.run("HcclAlltoAll", mine, ctypes.c_uint64(count), kind, out, ctypes.c_uint64(count), kind)
            part = slice(me.rank * count, (me.rank + 1) * count)
            everyone = [contribution(r, count * me.ranks, type_name)[part] for r in range(me.ranks)]
            same(out, np.concatenate(everyone), f"{type_name} {count}")


def split(ranks: int) -> list[list[int]]:
    """matrix[i][j]: elements from rank i to rank j; some none, one over many rounds."""
    return [[((i * 5 + j * 3) % 4) * 90_000 for j in range(ranks)] for i in range(ranks)]


def expected_all_to_all(me: Rank, matrix: list[list[int]]) -> NDArray[Any]:
    parts = []
    for r in range(me.ranks):
        start = sum(matrix[r][: me.rank])
        parts.append(contribution(r, sum(matrix[r]), "float32")[start : start + matrix[r][me.rank]])
    return np.concatenate(parts)


def check_all_to_all_v(me: Rank) -> None:
    matrix = split(me.ranks)
    send = matrix[me.rank]
    receive = [matrix[r][me.rank] for r in range(me.ranks)]
    mine = contribution(me.rank, sum(send), "float32")
    out = np.empty(sum(receive), np.float32)
    kind = TYPES["float32"]
    send_starts = u64([sum(send[:r]) for r in range(me.ranks)])
    receive_starts = u64([sum(receive[:r]) for r in range(me.ranks)])
    me.run("HcclAlltoAllV", mine, u64(send), send_starts, kind, out, u64(receive), receive_starts, kind)
    same(out, expected_all_to_all(me, matrix), "uneven parts")


def check_all_to_all_vc(me: Rank) -> None:
    matrix = split(me.ranks)
    mine = contribution(me.rank, sum(matrix[me.rank]), "float32")
    out = np.empty(sum(matrix[r][me.rank] for r in range(me.ranks)), np.float32)
    flat = u64([count for row in matrix for count in row])
    me.run("HcclAlltoAllVC", mine, flat, TYPES["float32"], out, TYPES["float32"])
    same(out, expected_all_to_all(me, matrix), "uneven parts")


def check_send_recv_chain(me: Rank) -> None:
    for count in COUNTS:
        buffer = contribution(me.rank, count, "float32")
        if me.rank > 0:
            me.run("HcclRecv", buffer, ctypes.c_uint64(count), TYPES["float32"], me.rank - 1)
        if me.rank + 1 < me.ranks:
            me.run("HcclSend", buffer, ctypes.c_uint64(count), TYPES["float32"], me.rank + 1)
        same(buffer, contribution(0, count, "float32"), f"handed on {count}")


def check_batch_send_recv_ring(me: Rank) -> None:
    """Everyone sends first: only a batch, which moves all its messages at once, can do that."""
    right, left = (me.rank + 1) % me.ranks, (me.rank - 1) % me.ranks
    first, second = contribution(me.rank, 700_001, "float32"), contribution(me.rank + 50, 3, "float32")
    got = [np.empty_like(first), np.empty_like(second)]
    me.batch(
        [(SEND, first, "float32", right), (SEND, second, "float32", right)]
        + [(RECV, got[0], "float32", left), (RECV, got[1], "float32", left)]
    )
    same(got[0], contribution(left, 700_001, "float32"), "first message")
    same(got[1], contribution(left + 50, 3, "float32"), "second message")


def check_batch_to_itself(me: Rank) -> None:
    mine, got = contribution(me.rank, 9, "int8"), np.empty(9, np.int8)
    me.batch([(SEND, mine, "int8", me.rank), (RECV, got, "int8", me.rank)])
    same(got, mine, "message to itself")


def check_group(me: Rank) -> None:
    """Sends of a group do not wait for each other, and nothing is launched before the group ends."""
    right, left = (me.rank + 1) % me.ranks, (me.rank - 1) % me.ranks
    mine, got = contribution(me.rank, 500_000, "float32"), np.zeros(500_000, np.float32)
    me.call("HcclGroupStart")
    me.call("HcclSend", mine, ctypes.c_uint64(mine.size), TYPES["float32"], right, me.comm, me.stream)
    me.call("HcclRecv", got, ctypes.c_uint64(got.size), TYPES["float32"], left, me.comm, me.stream)
    me.synchronize()
    assert not got.any(), "a message arrived before HcclGroupEnd"
    me.call("HcclGroupEnd")
    me.synchronize()
    same(got, contribution(left, 500_000, "float32"), "grouped message")
    assert me.hccl.HcclGroupEnd() == E_PARA


def check_barrier(me: Rank) -> None:
    """Nobody passes before the last one came."""
    for late in range(me.ranks):
        if me.rank == late:
            time.sleep(0.2)
        arrived = time.monotonic()
        me.run("HcclBarrier")
        times = np.empty(me.ranks, np.float64)
        me.run("HcclAllGather", np.array([arrived]), times, ctypes.c_uint64(1), TYPES["float64"])
        left = time.monotonic()
        assert left >= times.max(), "left the barrier before the last rank came"


def check_many_small_operations_without_waiting(me: Rank) -> None:
    """500 dependent all_reduces queued at once."""
    buffer = np.ones(16, np.int64)
    for _ in range(500):
        me.call("HcclAllReduce", buffer, buffer, ctypes.c_uint64(16), TYPES["int64"], OPS["max"], me.comm, me.stream)
        buffer_sum = np.zeros(16, np.int64)
    me.synchronize()
    me.run("HcclAllReduce", buffer, buffer_sum, ctypes.c_uint64(16), TYPES["int64"], OPS["sum"])
    same(buffer_sum, np.full(16, me.ranks), "sum of ones")


def check_sub_communicator(me: Rank) -> None:
    members = [r for r in range(me.ranks) if r != 1] if me.ranks > 2 else [1, 0]
    if me.rank not in members:
        return
    whole, sub = me.comm, ctypes.c_void_p()
    ids = (ctypes.c_uint32 * len(members))(*members)
    for _ in range(2):  # the same group again, after the first was destroyed
        sub_rank = members.index(me.rank)
        me.call(
            "HcclCreateSubCommConfig", ctypes.byref(whole), len(members), ids, ctypes.c_uint64(5), sub_rank, None,
            ctypes.byref(sub),
        )  # fmt: skip
        size = ctypes.c_uint32()
        me.call("HcclGetRankSize", sub, ctypes.byref(size))
        assert size.value == len(members)
        out = np.empty(len(members), np.int32)
        mine = np.array([me.rank], np.int32)
        me.call("HcclAllGather", mine, out, ctypes.c_uint64(1), TYPES["int32"], sub, me.stream)
        me.synchronize()
        same(out, np.array(members, np.int32), "ranks of the group")
        me.call("HcclCommDestroy", sub)


def check_rank_table(me: Rank) -> None:
    folder = Path(sys.argv[1])
    path = folder / "rank_table.json"
    if me.rank == 0:
        devices = [{"device_id": str(r), "rank_id": str(r)} for r in range(me.ranks)]
        table = {"version": "1.0", "folder": str(folder), "server_list": [{"server_id": "0", "device": devices}]}
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(table))
        draft.rename(path)
    wait_for_file(path)
    comm, rank = ctypes.c_void_p(), ctypes.c_uint32()
    me.call("HcclCommInitClusterInfo", str(path).encode(), me.rank, ctypes.byref(comm))
    me.call("HcclGetRankId", comm, ctypes.byref(rank))
    assert rank.value == me.rank
    me.call("HcclBarrier", comm, me.stream)
    me.synchronize()
    me.call("HcclCommDestroy", comm)


def check_refusals(me: Rank) -> None:
    """Wrong arguments: HCCL's code and a message that says what is wrong; nothing reaches the stream."""
    buffer, one = np.ones(4, np.float32), ctypes.c_uint64(4)
    fp32, total = TYPES["float32"], OPS["sum"]
    for type_name in ("float64", "uint8", "uint64"):
        message = refused(me, E_NOT_SUPPORT, "HcclAllReduce", buffer, buffer, one, TYPES[type_name], total)
        assert type_name in message, message
    for type_name in ("int16", "bfloat16"):
        message = refused(me, E_NOT_SUPPORT, "HcclAllReduce", buffer, buffer, one, TYPES[type_name], OPS["prod"])
        assert "prod" in message, message
    refused(me, E_PARA, "HcclAllReduce", buffer, buffer, one, fp32, 9)
    refused(me, E_PARA, "HcclAllReduce", buffer, buffer, ctypes.c_uint64(1 << 40), fp32, total)
    refused(me, E_PTR, "HcclAllReduce", None, buffer, one, fp32, total)
    message = refused(me, E_PARA, "HcclBroadcast", buffer, one, fp32, me.ranks)
    assert f"root {me.ranks}" in message, message
    message = refused(me, E_PARA, "HcclAlltoAll", buffer, one, fp32, buffer, one, fp32)
    assert "in place" in message, message
    refused(me, E_PARA, "HcclSend", buffer, one, fp32, me.ranks)
    message = refused(me, E_NOT_SUPPORT, "HcclBroadcast", buffer, one, 12, 0)
    assert "int128" in message, message
    assert me.hccl.HcclBarrier(None, me.stream) == E_PTR
    assert me.hccl.HcclBarrier(ctypes.c_void_p(0x1234), me.stream) == E_PARA
    assert me.hccl.HcclBarrier(me.comm, None) == E_PTR


def check_nothing_stays_in_shared_memory(me: Rank) -> None:
    """The segment is unlinked as soon as all have joined: a crash later leaves nothing behind."""
    name = ctypes.create_string_buffer(128)
    me.call("HcclGetCommName", me.comm, name)
    assert name.value.startswith(b"npu_compiler_hccl_")
    assert not (Path("/dev/shm") / name.value.decode()).exists()


def all_reduce(me: Rank, count: int = 16) -> None:
    buffer = np.ones(count, np.float32)
    me.run("HcclAllReduce", buffer, buffer, ctypes.c_uint64(count), TYPES["float32"], OPS["sum"])


def scenario_dead_peer(me: Rank) -> None:
    all_reduce(me)
    if me.rank == 1:
        os._exit(7)
    all_reduce(me)


def scenario_late_peer(me: Rank) -> None:
    all_reduce(me)
    if me.rank == 1:
        wait_for_file(Path(sys.argv[1]) / "outcome.0.json")
    all_reduce(me)


def scenario_peer_destroys(me: Rank) -> None:
    all_reduce(me)
    if me.rank == 1:
        me.call("HcclCommDestroy", me.comm)
        wait_for_file(Path(sys.argv[1]) / "outcome.0.json")
        return
    all_reduce(me)


def scenario_other_count(me: Rank) -> None:
    all_reduce(me, 16 + me.rank)


def scenario_other_operation(me: Rank) -> None:
    if me.rank == 0:
        all_reduce(me)
    else:
        me.run("HcclBarrier")


def scenario_all_to_all_counts(me: Rank) -> None:
    mine, out = np.ones(8, np.float32), np.empty(8, np.float32)
    send, receive, starts = u64([4, 4]), u64([4, 3 if me.rank == 1 else 4]), u64([0, 4])
    me.run("HcclAlltoAllV", mine, send, starts, TYPES["float32"], out, receive, starts, TYPES["float32"])


def scenario_message_size(me: Rank) -> None:
    buffer = np.ones(8, np.float32)
    if me.rank == 0:
        me.run("HcclSend", buffer, ctypes.c_uint64(8), TYPES["float32"], 1)
    else:
        me.run("HcclRecv", buffer, ctypes.c_uint64(5), TYPES["float32"], 0)


def run_checks(me: Rank, folder: Path) -> None:
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check(me)
                results[name] = ""
            except Exception:  # noqa: BLE001  every failure is reported by name, whatever it is
                results[name] = traceback.format_exc()
    (folder / f"results.{me.rank}.json").write_text(json.dumps(results))


def run_scenario(me: Rank, folder: Path, scenario: str) -> None:
    outcome: dict[str, Any] = {"code": 0, "message": ""}
    begin = time.monotonic()
    try:
        globals()[f"scenario_{scenario}"](me)
    except HcclError as error:
        outcome = {"code": error.code, "message": str(error)}
    outcome["seconds"] = time.monotonic() - begin
    state = ctypes.c_int()
    if me.hccl.HcclGetCommAsyncError(me.comm, ctypes.byref(state)) == 0:
        outcome["async_error"] = state.value
    draft = folder / f"outcome.{me.rank}.draft"
    draft.write_text(json.dumps(outcome))
    draft.rename(folder / f"outcome.{me.rank}.json")


def main() -> None:
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    me = Rank(rank, ranks)
    me.join(folder)
    if len(sys.argv) > 4:
        run_scenario(me, folder, sys.argv[4])
    else:
        run_checks(me, folder)


if __name__ == "__main__":
    main()
