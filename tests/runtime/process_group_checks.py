"""Checks that run inside rank processes of torch.distributed with backend "hccl":
`python -m tests.runtime.process_group_checks FOLDER RANK RANKS [SCENARIO]` (tests/ranks.py).
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch_npu
from torch.distributed import ReduceOp

from tests.ranks import main

RANK = int(sys.argv[2]) if len(sys.argv) > 2 else 0
RANKS = int(sys.argv[3]) if len(sys.argv) > 3 else 1
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64]


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `rank` contributes: small integers, so that every reduction over a few ranks is exact in every type."""
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randint(-5, 6, shape, generator=generator).to(dtype)


def everyone(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [values(rank, *shape, dtype=dtype) for rank in range(RANKS)]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


def check_all_reduce() -> None:
    for dtype in TYPES:
        whole = torch.stack(everyone(3, 50, dtype=dtype)).double()
        for op, expected in (
            (ReduceOp.SUM, whole.sum(0)),
            (ReduceOp.MAX, whole.amax(0)),
            (ReduceOp.MIN, whole.amin(0)),
        ):
            x = values(RANK, 3, 50, dtype=dtype).npu()
            dist.all_reduce(x, op)
            same(x, expected.to(dtype))


def check_all_reduce_product() -> None:
    x = values(RANK, 40).npu()
    dist.all_reduce(x, ReduceOp.PRODUCT)
    same(x, torch.stack(everyone(40)).prod(0))


def check_all_reduce_refuses_float64() -> None:
    try:
        dist.all_reduce(values(RANK, 4, dtype=torch.float64).npu())
    except RuntimeError as error:
        assert "Unsupported data type" in str(error), error
    else:
        raise AssertionError("float64 was not refused")


def check_all_reduce_large() -> None:
    x = values(RANK, 1_500_001, dtype=torch.bfloat16).npu()
    dist.all_reduce(x)
    same(x, torch.stack(everyone(1_500_001, dtype=torch.bfloat16)).float().sum(0).bfloat16())


def check_all_reduce_async() -> None:
    tensors = [values(RANK, 64).npu() for _ in range(5)]
    for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
        work.wait()
    for x in tensors:
        same(x, torch.stack(everyone(64)).sum(0))


def check_all_reduce_on_a_side_stream() -> None:
    side = torch.npu.Stream()
    x = values(RANK, 1000).npu()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        dist.all_reduce(x)
    torch.npu.current_stream().wait_stream(side)
    same(x, torch.stack(everyone(1000)).sum(0))


def check_broadcast() -> None:
    for dtype in [*TYPES, torch.bool, torch.uint8, torch.float64]:
        for root in range(RANKS):
            x = values(RANK, 33, dtype=dtype).npu()
            dist.broadcast(x, root)
            same(x, values(root, 33, dtype=dtype))


def check_reduce() -> None:
    for root in range(RANKS):
        x = values(RANK, 33).npu()
        dist.reduce(x, root, ReduceOp.SUM)
        if root == RANK:
            same(x, torch.stack(everyone(33)).sum(0))


def check_all_gather() -> None:
    for dtype in TYPES:
        out = [torch.empty(2, 9, dtype=dtype, device="npu") for _ in range(RANKS)]
        dist.all_gather(out, values(RANK, 2, 9, dtype=dtype).npu())
        for found, expected in zip(out, everyone(2, 9, dtype=dtype), strict=True):
            same(found, expected)


def check_all_gather_uneven() -> None:
    out = [torch.empty(4 + 3 * rank, device="npu") for rank in range(RANKS)]
    dist.all_gather(out, values(RANK, 4 + 3 * RANK).npu())
    for rank, found in enumerate(out):
        same(found, values(rank, 4 + 3 * rank))


def check_all_gather_into_tensor() -> None:
    out = torch.empty(RANKS * 6, 5, device="npu")
    dist.all_gather_into_tensor(out, values(RANK, 6, 5).npu())
    same(out, torch.cat(everyone(6, 5)))


def check_reduce_scatter() -> None:
    out = torch.empty(7, device="npu")
    dist.reduce_scatter(out, [part.contiguous().npu() for part in values(RANK, RANKS, 7)])
    same(out, torch.stack(everyone(RANKS, 7)).sum(0)[RANK])


def check_reduce_scatter_tensor() -> None:
    for dtype in TYPES:
        out = torch.empty(8, dtype=dtype, device="npu")
        dist.reduce_scatter_tensor(out, values(RANK, RANKS * 8, dtype=dtype).npu())
        whole = torch.stack(everyone(RANKS * 8, dtype=dtype)).double().sum(0).to(dtype)
        same(out, whole[RANK * 8 : RANK * 8 + 8])


def check_scatter() -> None:
    for root in range(RANKS):
        out = torch.empty(5, device="npu")
        parts = [part.contiguous().npu() for part in values(RANK, RANKS, 5)] if root == RANK else None
        dist.scatter(out, parts, src=root)
        same(out, values(root, RANKS, 5)[RANK])


def check_gather() -> None:
    for root in range(RANKS):
        out = [torch.empty(5, device="npu") for _ in range(RANKS)] if root == RANK else None
        dist.gather(values(RANK, 5).npu(), out, dst=root)
        for found, expected in zip(out or [], everyone(5), strict=False):
            same(found, expected)


def check_all_to_all_single() -> None:
    x = values(RANK, RANKS * 4, 3).npu()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    same(out, torch.cat([v[RANK * 4 : RANK * 4 + 4] for v in everyone(RANKS * 4, 3)]))


def check_all_to_all_single_uneven() -> None:
    """Rank i sends 2*i + 3*j rows to rank j: some rank gets nothing from itself."""
    sends = [[2 * i + 3 * j for j in range(RANKS)] for i in range(RANKS)]
    receives = [sends[i][RANK] for i in range(RANKS)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = values(RANK, sum(sends[RANK]), 6, dtype=dtype).npu()
        out = torch.empty(sum(receives), 6, dtype=dtype, device="npu")
        dist.all_to_all_single(out, x, output_split_sizes=receives, input_split_sizes=sends[RANK])
        parts = [values(i, sum(sends[i]), 6, dtype=dtype).split(sends[i])[RANK] for i in range(RANKS)]
        same(out, torch.cat(parts))


def check_all_to_all_list() -> None:
    mine = [part.contiguous().npu() for part in values(RANK, RANKS, 11)]
    out = [torch.empty(11, device="npu") for _ in range(RANKS)]
    dist.all_to_all(out, mine)
    for rank, found in enumerate(out):
        same(found, values(rank, RANKS, 11)[RANK])


def check_send_recv() -> None:
    x = values(0, 300_000, dtype=torch.float16).npu() if RANK == 0 else torch.zeros(300_000).half().npu()
    if RANK == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    else:
        dist.recv(x, 0)
        dist.send(values(1, 300_000, dtype=torch.float16).npu(), 0)
    same(x, values(1 - RANK, 300_000, dtype=torch.float16))


def check_batch_isend_irecv() -> None:
    got = torch.empty(100_000, device="npu")
    operations = [
        dist.P2POp(dist.isend, values(RANK, 100_000).npu(), (RANK + 1) % RANKS),
        dist.P2POp(dist.irecv, got, (RANK - 1) % RANKS),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    same(got, values((RANK - 1) % RANKS, 100_000))


def check_barrier() -> None:
    """Seen by the clock that both processes share: nobody leaves before the last one came."""
    for late in range(RANKS):
        if late == RANK:
            time.sleep(0.2)
        came = torch.tensor([time.monotonic()], dtype=torch.float64)
        dist.barrier()
        left = time.monotonic()
        arrivals = torch.empty(RANKS, dtype=torch.float64, device="npu")
        dist.all_gather_into_tensor(arrivals, came.npu())
        assert left >= arrivals.cpu().max().item()


def check_new_group() -> None:
    alone = dist.new_group([1])
    together = dist.new_group([0, 1])
    x = values(RANK, 10).npu()
    if RANK == 1:
        dist.all_reduce(x, group=alone)
        assert dist.get_rank(alone) == 0 and dist.get_world_size(alone) == 1
    same(x, values(RANK, 10))
    dist.all_reduce(x, group=together)
    same(x, torch.stack(everyone(10)).sum(0))
    dist.destroy_process_group(together)
    dist.barrier()  # the world's own communicator is still there


def check_two_groups_at_once() -> None:
    """Collectives of different groups may be under way at the same time, in either order."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    x, y = values(RANK, 20_000).npu(), values(RANK, 300).npu()
    works = [dist.all_reduce(x, group=first, async_op=True), dist.all_reduce(y, group=second, async_op=True)]
    for work in works if RANK == 0 else reversed(works):
        work.wait()
    same(x, torch.stack(everyone(20_000)).sum(0))
    same(y, torch.stack(everyone(300)).sum(0))


def check_captured_all_reduce() -> None:
    """One capture, many replays, each on fresh input."""
    x = torch.zeros(4, 256, device="npu")
    dist.all_reduce(x)  # the communicator is made before the capture
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        dist.all_reduce(x)
    for step in range(200):
        x.copy_(values(RANK, 4, 256) + step)
        graph.replay()
        same(x, torch.stack(everyone(4, 256)).sum(0) + step * RANKS)


def group_name() -> str:
    """The name of the default group's communicator, made by a first collective."""
    dist.all_reduce(torch.zeros(1, device="npu"))
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)


def summed_products(x: list[torch.Tensor], w: list[torch.Tensor], more: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Small integers: exact in every type."""
    return torch.stack([a.double() @ b.double() + more for a, b in zip(x, w, strict=True)]).sum(0)


def check_matmul_all_reduce() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for rows in (1, 40):
            x, w = everyone(rows, 8, dtype=dtype), everyone(8, 6, dtype=dtype)
            bias, x3 = torch.arange(6).to(dtype), torch.ones(rows, 6, dtype=dtype)
            mine = (x[RANK].npu(), w[RANK].npu(), group_name())
            same(torch_npu.npu_mm_all_reduce_base(*mine), summed_products(x, w).to(dtype))
            found = torch_npu.npu_mm_all_reduce_base(*mine, bias=bias.npu())
            same(found, summed_products(x, w, bias.double()).to(dtype))
            found = torch_npu.npu_mm_all_reduce_base(*mine, bias=bias.npu(), x3=x3.npu())
            same(found, summed_products(x, w, bias.double() + 1).to(dtype))


def check_matmul_all_reduce_of_a_transposed_weight_in_three_dimensions() -> None:
    x, w = everyone(2, 3, 8, dtype=torch.bfloat16), everyone(6, 8, dtype=torch.bfloat16)
    found = torch_npu.npu_mm_all_reduce_base(x[RANK].npu(), w[RANK].npu().t(), group_name())
    same(found, summed_products(x, [v.t() for v in w]).bfloat16())


def check_captured_matmul_all_reduce() -> None:
    """The row-parallel linear of a decode step: one task."""
    x, w = torch.zeros(2, 8, device="npu").bfloat16(), values(RANK, 8, 16, dtype=torch.bfloat16).npu()
    name = group_name()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = torch_npu.npu_mm_all_reduce_base(x, w, name)
    for step in range(1, 30):
        fresh = [v * (step % 3) for v in everyone(2, 8, dtype=torch.bfloat16)]
        x.copy_(fresh[RANK])
        graph.replay()
        same(y, summed_products(fresh, everyone(8, 16, dtype=torch.bfloat16)).bfloat16())


def check_compiled_matmul_all_reduce_in_two_groups() -> None:
    """As of two engines in one process: each program keeps to its group and its option. Rank 0 alone has a bias, as
    vLLM does it."""
    from npu_compiler.backend import ascend, report  # for this check alone: dynamo takes seconds to import

    pair = dist.new_group(list(range(RANKS)), backend="hccl")
    x, w = everyone(3, 8, dtype=torch.bfloat16), everyone(8, 16, dtype=torch.bfloat16)
    mine, bias = (x[RANK].npu(), w[RANK].npu()), torch.arange(16).bfloat16()
    expected = (summed_products(x, w) + bias.double()).bfloat16()
    operator = "npu_fused.matmul_all_reduce.default"
    for name, rows, provider in (("0", 3, "aclnnMatmulAllReduce"), (pair.group_name, 4, "")):

        def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, name: str = name) -> torch.Tensor:
            product = torch.addmm(bias, x, w) if RANK == 0 else x @ w
            functional = torch.ops._c10d_functional
            return functional.wait_tensor(functional.all_reduce(product, "sum", name))

        torch._dynamo.reset()
        compiled = torch.compile(
            linear, backend="ascend", options={"matmul_all_reduce": rows, "capture": bool(provider)}
        )
        for _ in range(3):  # uncaptured, captured, replayed
            same(compiled(*mine, bias.npu()), expected)
        graph = ascend.compiled()[-1].graph
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count(operator) == bool(provider), targets
        assert not provider or f"matmul_all_reduce x1: {provider}" in report()


def check_matmul_all_reduce_refuses() -> None:
    x, w = torch.zeros(2, 8).half().npu(), torch.zeros(8, 4).half().npu()
    name = group_name()
    for message, arguments, more in (
        ("names no communicator of this process", (x, w, "nobody"), {}),
        ("has to be float16 or bfloat16", (x.float(), w.float(), name), {}),
        ("has to be sum", (x, w, name), {"reduce_op": "max"}),
        ("has to be 0, not 1", (x, w, name), {"comm_turn": 1}),
        ("has to have shape", (x, w, name), {"bias": x[0]}),
    ):
        try:
            torch_npu.npu_mm_all_reduce_base(*arguments, **more)
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")


def check_captured_gather_and_scatter() -> None:
    """What sequence parallelism captures: an all_gather, then a reduce_scatter of its result."""
    x, whole, out = (torch.zeros(n, 8, device="npu") for n in (4, 4 * RANKS, 4))
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(out, whole)
    for step in range(20):
        x.copy_(values(RANK, 4, 8) * step)
        graph.replay()
        same(whole, torch.cat(everyone(4, 8)) * step)
        same(out, values(RANK, 4, 8) * step * RANKS)


def check_captured_all_to_all() -> None:
    sends = [[1 + i + 2 * j for j in range(RANKS)] for i in range(RANKS)]
    receives = [sends[i][RANK] for i in range(RANKS)]
    x = torch.zeros(sum(sends[RANK]), 3, device="npu")
    out = torch.zeros(sum(receives), 3, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        dist.all_to_all_single(out, x, output_split_sizes=receives, input_split_sizes=sends[RANK])
    for step in range(20):
        x.copy_(values(RANK, sum(sends[RANK]), 3) + step)
        graph.replay()
        same(out, torch.cat([values(i, sum(sends[i]), 3).split(sends[i])[RANK] for i in range(RANKS)]) + step)


def check_functional_collectives() -> None:
    import torch.distributed._functional_collectives as functional

    group = dist.group.WORLD
    x = values(RANK, 6, 4).npu()
    same(functional.wait_tensor(functional.all_reduce(x, "sum", group)), torch.stack(everyone(6, 4)).sum(0))
    same(functional.wait_tensor(functional.all_gather_tensor(x, 0, group)), torch.cat(everyone(6, 4)))
    same(x, values(RANK, 6, 4))


def check_coalesced_all_reduce() -> None:
    tensors = [values(RANK, n).npu() for n in (3, 70, 500)]
    dist.all_reduce_coalesced(tensors)
    for x, n in zip(tensors, (3, 70, 500), strict=True):
        same(x, torch.stack(everyone(n)).sum(0))


def check_objects() -> None:
    found: list[object] = [None] * RANKS
    dist.all_gather_object(found, {"rank": RANK, "text": "x" * (10 * RANK)})
    assert found == [{"rank": r, "text": "x" * (10 * r)} for r in range(RANKS)]
    shared: list[object] = [["from", 0]] if RANK == 0 else [None]
    dist.broadcast_object_list(shared, src=0)
    assert shared == [["from", 0]]


def check_names() -> None:
    assert dist.get_backend() == "hccl" and dist.get_world_size() == RANKS and dist.get_rank() == RANK
    assert dist.is_initialized() and dist.is_available()


def check_communicator_name() -> None:
    """What fused communication operators take as their group: the same on all ranks, and not empty."""
    backend = dist.group.WORLD._get_backend(torch.device("npu"))
    names: list[object] = [None] * RANKS
    dist.all_gather_object(names, backend.get_hccl_comm_name(RANK))
    assert names[0] and len(set(names)) == 1, names


def check_data_parallel_gradients() -> None:
    """DistributedDataParallel's reducer: gradients are the mean over the ranks' batches."""
    torch.manual_seed(3)
    model = torch.nn.Linear(6, 4)
    reference = torch.nn.Linear(6, 4)
    reference.load_state_dict(model.state_dict())
    wrapped = torch.nn.parallel.DistributedDataParallel(model.npu())
    wrapped(values(RANK, 5, 6).npu()).square().mean().backward()
    torch.stack([reference(batch).square().mean() for batch in everyone(5, 6)]).mean().backward()
    torch.testing.assert_close(model.weight.grad.cpu(), reference.weight.grad)
    torch.testing.assert_close(model.bias.grad.cpu(), reference.bias.grad)


def check_init_again() -> None:
    """The last check: after destroying everything a process group can be made again, over TCP this time."""
    port = 0
    if RANK == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    shared: list[object] = [port]
    dist.broadcast_object_list(shared, src=0)
    dist.destroy_process_group()
    assert not dist.is_initialized()
    dist.init_process_group("hccl", init_method=f"tcp://127.0.0.1:{shared[0]}", rank=RANK, world_size=RANKS)
    x = values(RANK, 12).npu()
    dist.all_reduce(x)
    same(x, torch.stack(everyone(12)).sum(0))


def scenario_dead_peer() -> None:
    dist.all_reduce(values(RANK, 8).npu())
    torch.npu.synchronize()
    if RANK == 1:
        os._exit(7)
    dist.all_reduce(values(RANK, 8).npu())
    torch.npu.synchronize()


def scenario_mismatch() -> None:
    dist.all_reduce(values(RANK, 8 + RANK).npu())
    torch.npu.synchronize()


if __name__ == "__main__":
    main(globals())
