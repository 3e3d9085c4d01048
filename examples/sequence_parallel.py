"""A tensor-parallel MLP on two ranks, with and without sequence parallel: the same result, other collectives.

torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

import npu_compiler

ROWS, WIDTH, INNER = 6, 64, 128


def summed(partial: Tensor) -> Tensor:
    total = torch.ops._c10d_functional.all_reduce(partial, "sum", "0")  # "0" is the default group's name
    return torch.ops._c10d_functional.wait_tensor(total)


def layer(x: Tensor, up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """x [rows, WIDTH] and the norm's weight are the same on all ranks; each has its columns of up, its rows of down."""
    hidden = summed(torch.relu(x @ up) @ down)
    return torch.nn.functional.rms_norm(hidden, (WIDTH,), weight, 1e-6) @ up


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl")
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    operands = [
        torch.randn(ROWS, WIDTH, generator=shared),
        torch.randn(WIDTH, INNER // ranks, generator=own),
        torch.randn(INNER // ranks, WIDTH, generator=own),
        torch.rand(WIDTH, generator=shared),
    ]
    given = [item.npu() for item in operands]
    results = []
    for rows in (0, 1):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="ascend", options={"sequence_parallel": rows})
        with torch.inference_mode():
            results += [compiled(*given).cpu() for _ in range(3)]  # called, captured, replayed
    if rank == 0:
        print("the same bits:", all(torch.equal(result, results[0]) for result in results))
        print("\n".join(line for line in npu_compiler.report().splitlines() if "fired sequence_parallel" in line))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
