"""Process groups by the names that a program's collectives have for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import fx
from torch._C._distributed_c10d import ProcessGroup, _register_process_group, _unregister_process_group
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.graph.effects import argument


def ranks_of(group: str) -> int:
    """How many ranks a group has; 0 where this process has no group of that name."""
    try:
        return _resolve_process_group(group).size()
    except RuntimeError:
        return 0


def rank_in(group: str) -> int:
    """This process's number in a group that it has."""
    return _resolve_process_group(group).rank()


def group_of(node: fx.Node) -> str:
    """The name of the group whose ranks a call is about; empty for other calls."""
    name = _argument_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    given = argument(node, name) if name else ""
    return given if isinstance(given, str) else ""


@functools.lru_cache(maxsize=512)
def _argument_of(target: torch._ops.OpOverload) -> str:
    names = {entry.name for entry in target._schema.arguments}
    return next((name for name in ("group", "group_name") if name in names), "")


def places_in(graph: fx.Graph) -> dict[str, tuple[int, int]]:
    """This process's number in the groups that a program's calls name, and how many ranks each has, by name; without
    those that this process has not."""
    names = dict.fromkeys(group for node in graph.nodes if (group := group_of(node)))
    return {name: (rank_in(name), ranks) for name in names if (ranks := ranks_of(name))}


@contextlib.contextmanager
def made_up(places: Mapping[str, tuple[int, int]]) -> Iterator[None]:
    """While this is open, this process has a place in each group that it has not itself. Passes ask for no more than
    that; nothing can be sent, so a collective raises.

    Args:
        places: as of `places_in`.
    """
    missing = {name: place for name, place in places.items() if not ranks_of(name)}
    groups = {name: ProcessGroup(dist.HashStore(), *place) for name, place in missing.items()}
    for name, group in groups.items():
        _register_process_group(name, group)
    try:
        yield
    finally:
        for name in groups:
            _unregister_process_group(name)
