"""Ranks without processes: one program, run for all ranks of a group side by side in this process.

`run`: a call is made for every rank before the next one is, so a collective has what all ranks give to it. Operators
that communicate are computed here from their documented meaning, in the order of the ranks; all others are called.
`together`: the ranks are threads, and operators that communicate are called like all others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C._distributed_c10d import (
    _register_process_group,
    _set_thread_isolation_mode,
    _unregister_process_group,
)
from torch.testing._internal.distributed import multi_threaded_pg
from torch.testing._internal.distributed.fake_pg import FakeStore

DEFAULT = "0"
"""The name that torch gives to the default group."""
Each = list[tuple[Any, ...]]
"""The arguments of a call, for each rank."""


@contextlib.contextmanager
def group_of(ranks: int, rank: int = 0) -> Iterator[None]:
    """The default group has so many ranks, of which only one is there and nothing can be sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """The default group under one more name, as if it were another group of the same ranks."""
    group = dist.group.WORLD
    assert group is not None
    _register_process_group(name, group)
    try:
        yield
    finally:
        _unregister_process_group(name)


def run(module: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """What the program returns on each rank, given the inputs of each."""
    ranks = len(inputs)
    values: list[dict[fx.Node, Any]] = [{} for _ in range(ranks)]
    given = [iter(one) for one in inputs]
    for node in module.graph.nodes:
        if node.op == "placeholder":
            results = [next(one) for one in given]
        elif node.op == "get_attr":
            results = [getattr(module, node.target)] * ranks
        else:
            args = [fx.node.map_arg(node.args, lambda item, rank=rank: values[rank][item]) for rank in range(ranks)]
            if node.op == "output":
                return [one[0] for one in args]
            kwargs = [fx.node.map_arg(node.kwargs, lambda item, rank=rank: values[rank][item]) for rank in range(ranks)]
            together = COLLECTIVES.get(str(node.target))
            if together is not None:
                results = together(args)
            else:
                results = [node.target(*one, **named) for one, named in zip(args, kwargs, strict=True)]
        for rank, result in enumerate(results):
            values[rank][node] = result
    raise AssertionError("a program has an output")


def _all_reduce(each: Each) -> list[Tensor]:
    total = _total([args[0] for args in each])
    return [total.clone() for _ in each]


def _wait(each: Each) -> list[Tensor]:
    return [args[0] for args in each]


def _reduce_scatter(each: Each) -> list[Tensor]:
    return _parts(_total([args[0] for args in each]), len(each))


def _gather_all(each: Each) -> list[Tensor]:
    whole = torch.cat([args[0] for args in each])
    return [whole.clone() for _ in each]


def _all_gather(each: Each) -> list[Tensor]:
    whole = torch.cat([args[0] for args in each])
    return [whole[: args[3]].clone() for args in each]


def _shard(each: Each) -> list[Tensor]:
    return [_parts(args[0], len(each))[rank] for rank, args in enumerate(each)]


def _all_to_all(each: Each) -> list[Tensor]:
    """To each rank its rows of every rank's columns."""
    parts = [_parts(args[0], len(each)) for args in each]
    return [torch.cat([of_one[rank] for of_one in parts], dim=1) for rank in range(len(each))]


def _gather_columns(each: Each) -> list[Tensor]:
    whole = torch.cat([args[0] for args in each], dim=1)
    return [whole.clone() for _ in each]


def _own_layer(each: Each) -> list[Tensor]:
    return [args[0][min(rank, len(args[0]) - 1)].clone() for rank, args in enumerate(each)]


def _broadcast(each: Each) -> list[Tensor]:
    owner = each[0][1]
    return [each[owner][0].clone() for _ in each]


def _total(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _parts(whole: Tensor, ranks: int) -> list[Tensor]:
    size = -(-whole.shape[0] // ranks)
    filled = torch.cat([whole, whole.new_zeros((size * ranks - whole.shape[0], *whole.shape[1:]))])
    return [part.clone() for part in filled.split(size)] if size else [filled] * ranks


COLLECTIVES: dict[str, Callable[[Each], list[Any]]] = {
    "_c10d_functional.all_reduce.default": _all_reduce,
    "_c10d_functional.wait_tensor.default": _wait,
    "_c10d_functional.all_gather_into_tensor.default": _gather_all,
    "npu_fused.reduce_scatter_rows.default": _reduce_scatter,
    "npu_fused.all_gather_rows.default": _all_gather,
    "npu_fused.shard_rows.default": _shard,
    "npu_fused.all_to_all_rows.default": _all_to_all,
    "npu_fused.all_gather_columns.default": _gather_columns,
    "npu_fused.own_layer.default": _own_layer,
    "_c10d_functional.broadcast.default": _broadcast,
}


def together(ranks: int, function: Callable[[int], Any], devices: Sequence[str] = ("cpu",)) -> list[Any]:
    """What `function` returns for each rank, called for all of them at once: ranks are threads of this process, whose
    default group sends from one to the other. Random numbers are shared, so draw them before. Every thread has the
    caller's streams: an engine of vLLM that ran before leaves the main thread on one of its own."""
    streams = [torch.accelerator.current_stream()] if "npu" in devices else []
    results: list[Any] = [None] * ranks
    failures: list[BaseException] = []
    store = dist.HashStore()

    def run_rank(rank: int) -> None:
        backend = ",".join(f"{device}:threaded" for device in devices)
        dist.init_process_group(backend, rank=rank, world_size=ranks, store=store)
        try:
            for stream in streams:
                torch.accelerator.set_stream(stream)
            with torch.no_grad():
                results[rank] = function(rank)
        except BaseException as error:  # noqa: BLE001  whatever it is, the others wait for this rank
            failures.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    multi_threaded_pg._install_threaded_pg()
    _set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        _set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()
    if failures:
        raise failures[0]
    return results
