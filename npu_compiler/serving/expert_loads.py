"""How evenly tokens go to the ranks of their experts, of layers with a map: counted on the device by each layer
(routed_experts.py), read by the way of device_reader.py. Every rank counts for all ranks, as all see the whole routing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from vllm.config import VllmConfig

from npu_compiler.errors import UnservedError
from npu_compiler.inspect.run import ExpertRows
from npu_compiler.serving.device_reader import HostCopies, TimedCopies
from npu_compiler.serving.expert_imbalance import load_of
from npu_compiler.serving.expert_maps import ExpertMap
from npu_compiler.serving.options import ServingOptions
from npu_compiler.serving.routed_experts import NPURoutedExperts, placed_layers


class ExpertLoads:
    """The layers of a model that have a map, and what they count.

    Attributes:
        latest: as of the last copy that is done, by layer in the model's order.
        snapshot: a copy of the counts that whoever changes the map asks for.
    """

    def __init__(self) -> None:
        self.layers: list[NPURoutedExperts] = []
        self.latest: list[ExpertRows] = []
        self._copies = TimedCopies()
        self._placements: list[ExpertMap] = []
        self.snapshot = HostCopies()
        self._moved: dict[str, tuple[int, float]] = {}

    def find(self, config: VllmConfig, model: nn.Module) -> None:
        """Takes the layers of a model that was loaded.

        Raises:
            UnservedError: the map has more layers than the model.
        """
        self.layers = placed_layers(model)
        given = ServingOptions.of(config).expert_map
        if isinstance(given, dict) and len(given["layer_list"]) != len(self.layers):
            raise UnservedError(
                f"the option expert_map has {len(given['layer_list'])} layers, the model {len(self.layers)} that have "
                "experts",
                where=self.layers[-1].layer_name if self.layers else type(model).__name__,
                rule="a map has all layers with experts, counted from 0; the one above is the last",
                fix="make the file for this model",
            )
        if self.layers:
            self._real_rows = self.layers[0].real_rows
        for layer in self.layers:
            layer.real_rows = self._real_rows

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The forward pass of a step runs in it; what runs outside, as captures do, is not counted."""
        if not self.layers:
            yield
            return
        self._real_rows.fill_(tokens)
        yield
        self._real_rows.fill_(0)
        if not self._copies.asked:
            self._placements = [placement(layer) for layer in self.layers]
            self._copies.ask([layer.slot_rows for layer in self.layers])

    def take(self) -> list[ExpertRows]:
        """All layers' figures, if a copy is done that says something new. Waits for nothing."""
        copies = self._copies.take()
        if copies is None:
            return []
        before = self.latest
        self._note([counts.tolist() for counts in copies], self._placements)
        return self.latest if self.latest != before else []

    def wait(self) -> None:
        """Brings `latest` up to date. Waits for the device."""
        self._note([layer.slot_rows.tolist() for layer in self.layers], [placement(layer) for layer in self.layers])

    def clear(self) -> None:
        """Starts counting again."""
        self._copies, self.snapshot, self.latest = TimedCopies(), HostCopies(), []
        for layer in self.layers:
            layer.slot_rows.zero_()

    def changed(self, layer: NPURoutedExperts, before: float, moved: int) -> None:
        """A layer has a new map since now: its figures begin again, and keep the number of experts that moved."""
        self._moved[layer.layer_name] = (self._moved.get(layer.layer_name, (0, 0.0))[0] + moved, before)
        self._copies = TimedCopies()  # one that is under way is of the old map

    def _note(self, counts: Sequence[Sequence[int]], placements: Sequence[ExpertMap]) -> None:
        self.latest = [
            load_of(path(layer), rows, one, *self._moved.get(layer.layer_name, (0, 0.0)))
            for layer, rows, one in zip(self.layers, counts, placements, strict=True)
        ]


def path(layer: NPURoutedExperts) -> str:
    """Of the layer that the model has, whose part this one is."""
    return layer.layer_name.removesuffix(".routed_experts")


def placement(layer: NPURoutedExperts) -> ExpertMap:
    """The map of a layer that has one."""
    assert layer.placement is not None
    return layer.placement
