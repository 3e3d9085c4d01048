"""A process group of one rank in the test's own process, for operators that communicate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

DEFAULT = "0"
"""The name that torch gives to the default group."""


@contextlib.contextmanager
def one_rank() -> Iterator[dist.ProcessGroup]:
    """The default group: gloo for host tensors, HCCL for the device's. Gone afterwards."""
    dist.init_process_group("cpu:gloo,npu:hccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None and group.group_name == DEFAULT
        yield group
    finally:
        dist.destroy_process_group()
