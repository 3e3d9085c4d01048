"""Changes the map of experts while a model is served (docs/eplb.md): between two steps, one layer at a time.

All ranks run the same steps, and what is done at which step depends on their number and on rank 0's counts alone, so
every rank does the same. Nothing here waits for the device: counts are read some steps after they were copied.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.logger import init_logger

from npu_compiler.serving.expert_balance import balanced, rank_rows
from npu_compiler.serving.expert_imbalance import expert_rows, imbalance, rows_by_rank
from npu_compiler.serving.expert_loads import ExpertLoads, placement
from npu_compiler.serving.expert_moves import exchange, memory_of, moves
from npu_compiler.serving.options import ExpertRebalance
from npu_compiler.serving.routed_experts import NPURoutedExperts

logger = init_logger(f"vllm.{__name__}")
LAG = 4
"""Steps between a copy of the counts and its use: more than the host is ahead of the device."""


class Rebalancer:
    """Gives each layer a new map, where one is worth it, every so many steps.

    Args:
        group: the ranks that experts are spread over; its device group may have other collectives in it.
            Engines of data parallelism run the same steps: one that has no tokens for a step takes part in it.
    """

    def __init__(self, settings: ExpertRebalance, loads: ExpertLoads, group: GroupCoordinator) -> None:
        self._settings, self._loads, self._group = settings, loads, group
        self._seen = [torch.zeros(layer.slots + 1, dtype=torch.int64) for layer in loads.layers]
        self._waiting: deque[tuple[NPURoutedExperts, list[int]]] = deque()
        self._steps = 0

    def between_steps(self) -> None:
        """Called in front of each step, on every rank."""
        self._steps += 1
        if self._waiting:
            self._place(*self._waiting.popleft())
            self._steps = 0
        elif self._steps == self._settings.interval:
            self._loads.snapshot.ask([layer.slot_rows for layer in self._loads.layers])
        elif self._steps == self._settings.interval + LAG:
            self._waiting.extend(zip(self._loads.layers, self._counted(), strict=True))

    def _counted(self) -> list[list[int]]:
        """The rows of each slot, layer by layer, since the last time, as rank 0 counted them."""
        counts = self._loads.snapshot.take(wait=True)
        if counts is None:  # cleared in between
            counts = [torch.zeros_like(seen) for seen in self._seen]
        together = torch.cat(counts)
        dist.broadcast(together, src=self._group.ranks[0], group=self._group.cpu_group)
        now = list(together.split([len(seen) for seen in self._seen]))
        found = [_since(seen, rows) for seen, rows in zip(self._seen, now, strict=True)]
        self._seen = now
        return found

    def _place(self, layer: NPURoutedExperts, slot_rows: list[int]) -> None:
        old = placement(layer)
        rows = expert_rows(slot_rows, old)
        new = balanced(rows, old)
        before, after = max(rank_rows(rows, old)), max(rank_rows(rows, new))
        if after >= before or after > before * (1 - self._settings.least_gain):
            return
        given = moves(old, new)
        weights = [memory_of(weight) for weight in layer.slot_weights]
        exchange(weights, given, self._group.rank_in_group, self._group.world_size, self._group.device_group)
        layer.change(new)
        self._loads.changed(layer, imbalance(rows_by_rank(slot_rows, old)), len(given))
        self._seen[self._loads.layers.index(layer)].zero_()
        logger.debug("%s: %d experts moved", layer.layer_name, len(given))


def _since(seen: Tensor, now: Tensor) -> list[int]:
    """What was counted since; all of it where counting began again."""
    new = now - seen
    return (new if bool((new >= 0).all()) else now)[:-1].tolist()
