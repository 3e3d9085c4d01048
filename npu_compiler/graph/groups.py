"""Process groups by the names that a program's collectives have for them."""

from __future__ import annotations

from torch.distributed.distributed_c10d import _resolve_process_group


def ranks_of(group: str) -> int:
    """How many ranks a group has; 0 where this process has no group of that name."""
    try:
        return _resolve_process_group(group).size()
    except RuntimeError:
        return 0


def rank_in(group: str) -> int:
    """This process's number in a group that it has."""
    return _resolve_process_group(group).rank()
