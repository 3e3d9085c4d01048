"""The experts of a layer with a map: more slots than experts, and which of an expert's replicas a token goes to.

vLLM's layer has room for its rank's share of the experts. This one has it for the map's, and downstream of the choice
of a replica (`NPURoutedExperts.slots_of`) a layer is one of as many experts as there are slots, neighbours by rank,
whatever the communication is. Table and counters are buffers, inputs of the program: they change without a recapture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from npu_compiler.errors import UnservedError
from npu_compiler.serving.expert_maps import ExpertMap, maps_of, placed_in_turn
from npu_compiler.serving.options import ExpertRebalance, ServingOptions
from npu_compiler.serving.places import here


@RoutedExperts.register_oot
class NPURoutedExperts(RoutedExperts):
    """vLLM's experts of a layer, and where the option `expert_map` says so, slots of replicas.

    Attributes:
        placement: None: vLLM's own. `slots_here`: the first slot of this rank, and the one behind its last.
        slots, columns: of all ranks; of the table.
        gathered: whether its rows are gathered of ranks that have tokens of their own, padding behind each rank's.
        replica_table: int32 [experts * columns] (ExpertMap.table).
        slot_rows: int64 [slots + 1], rows that each slot of all ranks got since it was cleared; behind them padding.
        real_rows: int32 [1], how many rows of this engine's step are no padding; 0 outside. One for all layers.
    """

    placement: ExpertMap | None = None
    slots_here: tuple[int, int]
    slots: int
    columns: int
    gathered: bool
    replica_table: Tensor
    slot_rows: Tensor
    real_rows: Tensor

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: FusedMoEConfig,
        quant_config: Any,
        expert_map_manager: ExpertMapManager,
        **settings: Any,
    ) -> None:
        """Raises UnservedError as `placement_of` does."""
        placement = placement_of(get_current_vllm_config(), layer_name, moe_config, quant_config)
        if placement is not None:
            moe_config.num_local_experts = placement.each
        super().__init__(
            layer_name, params_dtype, moe_config, quant_config, expert_map_manager=expert_map_manager, **settings
        )
        self.local_num_experts = moe_config.num_local_experts
        if placement is not None:
            self._place(placement, expert_map_manager.ep_rank, gathered=moe_config.dp_size > 1)

    def _place(self, placement: ExpertMap, rank: int, gathered: bool = False) -> None:
        self.slots, self.columns, self._experts = len(placement.slots), placement.columns, placement.experts
        self.gathered = gathered
        self.slots_here, self._rank = (rank * placement.each, (rank + 1) * placement.each), rank
        self._note(placement)
        for name, value in (
            ("replica_table", torch.tensor(placement.table(), dtype=torch.int32)),
            ("slot_rows", torch.zeros(self.slots + 1, dtype=torch.int64)),
            ("real_rows", torch.zeros(1, dtype=torch.int32)),
        ):
            self.register_buffer(name, value, persistent=False)

    def _note(self, placement: ExpertMap) -> None:
        self.placement = placement
        self._slot_here = {expert: slot for slot, expert in enumerate(placement.ranks[self._rank])}

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        """The slot of this rank that an expert of the checkpoint is loaded into; -1: none."""
        if self.placement is None:
            return super()._map_global_expert_id_to_local_expert_id(expert_id)
        return self._slot_here.get(expert_id, -1)

    @property
    def slot_weights(self) -> list[Tensor]:
        """All that a slot holds, [slots here, ...] each."""
        own = dict(self.named_parameters(recurse=False))  # the router's bias is among them, too
        return [own[name] for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias") if name in own]

    def change(self, placement: ExpertMap) -> None:
        """Takes another map with as many slots, in the stream's order; the weights were moved. Counts begin again."""
        self._note(placement)
        table = torch.tensor(placement.table(), dtype=torch.int32, pin_memory=True)
        self.replica_table.copy_(table, non_blocking=True)
        self.slot_rows.zero_()

    def marked(self, experts: Tensor, first: int) -> Tensor:
        """Experts [rows, k] of this rank's own rows, those of padding with numbers behind the model's: once rows are
        gathered, nothing else tells it apart.

        Args:
            first: number of the first row in this engine's step.
        """
        row = torch.arange(experts.shape[0], device=experts.device, dtype=torch.int32) + first
        return torch.where((row < self.real_rows).unsqueeze(1), experts, experts + self._experts)

    def slots_of(self, experts: Tensor) -> Tensor:
        """The slot that each of a token's experts is computed in: int32 [tokens, k], of experts [tokens, k], which are
        `marked` where they are gathered. Counts them, without padding."""
        token = torch.arange(experts.shape[0], device=experts.device, dtype=torch.int32)
        if self.gathered:
            real = experts < self._experts
            experts = torch.where(real, experts, experts - self._experts)
        else:
            real = (token < self.real_rows).unsqueeze(1)
        places = experts.to(torch.int32) * self.columns + (token % self.columns).unsqueeze(1)
        slots = self.replica_table.index_select(0, places.view(-1)).view_as(places)
        counted = torch.where(real, slots, self.slots).view(-1).long()
        self.slot_rows.scatter_add_(0, counted, torch.ones_like(counted))
        return slots


def placement_of(config: VllmConfig, layer: str, moe: FusedMoEConfig, quantised: object) -> ExpertMap | None:
    """The map of the layer that is made just now; None without the options.

    Raises:
        UnservedError: the file has fewer layers, or the layer is quantised.
    """
    options = ServingOptions.of(config)
    if quantised is not None and (options.expert_map or options.expert_rebalance):
        raise UnservedError(
            "a map of quantised experts is not served on npu",
            where=here(layer),
            rule="only weights that are not quantised are put into the slots of a map",
            fix="leave expert_map and expert_rebalance out, or serve the model without quantisation",
        )
    given, ranks = options.expert_map, moe.moe_parallel_config.ep_size
    if not given:
        settings = ExpertRebalance.of(options.expert_rebalance)
        return placed_in_turn(moe.num_experts, ranks, settings.redundant) if settings else None
    maps = maps_of(given, moe.num_experts, ranks)  # type: ignore[arg-type]  # settled
    number = len(config.compilation_config.static_all_moe_layers)  # vLLM notes a layer when its experts are made
    if number >= len(maps):
        raise UnservedError(
            f"the option expert_map has {len(maps)} layers, and this one is number {number}",
            where=here(layer),
            rule="a map has all layers with experts, counted from 0",
            fix="add the layer to the file's layer_list",
        )
    return maps[number]


def placed_layers(model: torch.nn.Module) -> list[NPURoutedExperts]:
    """The layers of a model that have a map, in order."""
    found = (module for module in model.modules() if isinstance(module, NPURoutedExperts))
    return [layer for layer in found if layer.placement is not None]
