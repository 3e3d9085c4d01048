"""Which rank has which experts, layer by layer, and which replica of an expert a token goes to (docs/eplb.md).

The file is the one that vllm-ascend's `expert_map_path` reads and its `expert_map_record_path` writes, and MindIE's
`ep_level` file too::

    {"moe_layer_count": 1, "layer_list": [
        {"layer_id": 0, "device_count": 2, "device_list": [
            {"device_id": 0, "device_expert": [0, 1, 2]}, {"device_id": 1, "device_expert": [2, 3, 0]}]}]}

`layer_id` counts the layers that have experts, from 0; `device_id` is a rank of the experts' group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EVEN_UP_TO = 6
"""Replicas of an expert that get exactly as many of the table's columns each; more get as many but for one."""


@dataclass(frozen=True)
class ExpertMap:
    """The experts of one layer. A slot is room for one expert; slots are counted over all ranks, in order.

    Attributes:
        ranks: for each rank the expert of each of its slots: as many on each, none twice on one rank.
        experts: how many the model has; each is on some rank.
    """

    ranks: tuple[tuple[int, ...], ...]
    experts: int

    @property
    def each(self) -> int:
        """Slots of a rank."""
        return len(self.ranks[0])

    @property
    def slots(self) -> list[int]:
        """The expert of each slot of all ranks."""
        return [expert for rank in self.ranks for expert in rank]

    @property
    def replicas(self) -> list[list[int]]:
        """The slots of each expert, rising."""
        found: list[list[int]] = [[] for _ in range(self.experts)]
        for slot, expert in enumerate(self.slots):
            found[expert].append(slot)
        return found

    @property
    def columns(self) -> int:
        """Of `table`. It depends on the number of ranks only: a table that changes keeps its size."""
        return math.lcm(*range(1, min(len(self.ranks), EVEN_UP_TO) + 1))

    def table(self) -> list[int]:
        """[experts * columns]: the slot that the token in row t of a step goes to for expert e, at e * columns +
        t % columns. Replicas take turns; every other expert that has some begins with another one, so that a step of
        one token does not give them all to the first rank."""
        found: list[int] = []
        turn = 0
        for slots in self.replicas:
            found += [slots[(turn + column) % len(slots)] for column in range(self.columns)]
            turn += len(slots) > 1
        return found


def placed_in_turn(experts: int, ranks: int, redundant: int = 0) -> ExpertMap:
    """Experts in order, and behind the last the first ones again, `redundant` of them; without these vLLM's own linear
    placement, where ranks divide the experts."""
    each = (experts + redundant) // ranks
    slots = [slot % experts for slot in range(each * ranks)]
    return ExpertMap(tuple(tuple(slots[rank * each : (rank + 1) * each]) for rank in range(ranks)), experts)


def maps_of(given: Mapping[str, Any], experts: int, ranks: int) -> list[ExpertMap]:
    """The maps of a file's content, by layer.

    Args:
        experts: of a layer of the model. `ranks`: that they are spread over.

    Raises:
        ValueError: the content is none for such a model; it names the layer, the rank and the expert.
    """
    layers = given.get("layer_list")
    if not isinstance(layers, list) or not layers:
        raise _refused("it has no layer_list", 'see docs/eplb.md for the format, {"layer_list": [...]}')
    if given.get("moe_layer_count", len(layers)) != len(layers):
        raise _refused(
            f"moe_layer_count is {given['moe_layer_count']}, and layer_list has {len(layers)} layers", "correct one"
        )
    numbers = [_entry(layer, "layer_id", index, f"entry {index} of layer_list") for index, layer in enumerate(layers)]
    if sorted(numbers) != list(range(len(layers))):
        raise _refused(f"layer_id are {numbers}", f"name each of 0 to {len(layers) - 1} once: layers that have experts")
    by_number = dict(zip(numbers, layers, strict=True))
    return [_layer(by_number[number], f"layer {number}", experts, ranks) for number in range(len(layers))]


def _layer(given: Mapping[str, Any], where: str, experts: int, ranks: int) -> ExpertMap:
    devices = given.get("device_list")
    count = len(devices) if isinstance(devices, list) else 0
    if count != ranks or given.get("device_count", count) != count:
        told = f"device_count {given.get('device_count', count)}, device_list {count} long"
        raise _refused(f"{where}: {told}, for {ranks} ranks", "a map is for one number of ranks: make one for this")
    assert isinstance(devices, list)
    numbers = [_entry(device, "device_id", i, f"{where}, entry {i} of device_list") for i, device in enumerate(devices)]
    if sorted(numbers) != list(range(ranks)):
        raise _refused(f"{where}: device_id are {numbers}", f"name each of 0 to {ranks - 1} once")
    by_number = dict(zip(numbers, devices, strict=True))
    found = tuple(_rank(by_number[rank], f"{where}, device {rank}", experts) for rank in range(ranks))
    other = next((rank for rank, has in enumerate(found) if len(has) != len(found[0])), None)
    if other is not None:
        raise _refused(
            f"{where}: device 0 has {len(found[0])} experts and device {other} has {len(found[other])}",
            "give each device as many",
        )
    missing = sorted(set(range(experts)).difference(*found))
    if missing:
        raise _refused(f"{where}: expert {missing[0]} is on no device", "put each expert on at least one")
    return ExpertMap(found, experts)


def _rank(device: Mapping[str, Any], where: str, experts: int) -> tuple[int, ...]:
    has = device.get("device_expert")
    if not isinstance(has, list) or not has:
        raise _refused(f"{where} has no device_expert", "list the experts of each device")
    for place, expert in enumerate(has):
        if type(expert) is not int or not 0 <= expert < experts:
            raise _refused(f"{where}: {expert!r} is no expert", f"the model's experts are 0 to {experts - 1}")
        if expert in has[:place]:
            raise _refused(f"{where} has expert {expert} twice", "a second replica helps on another device only")
    return tuple(has)


def _entry(given: object, name: str, default: int, where: str) -> int:
    if not isinstance(given, Mapping) or type(given.get(name, default)) is not int:
        raise _refused(f"{where} is {given!r}", f"write an object whose {name} is a number")
    return int(given.get(name, default))


def content(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file of this name holds; a content itself stays.

    Raises:
        ValueError: there is no such file, or it is no JSON object.
    """
    if isinstance(given, Mapping):
        return given
    try:
        found = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise _refused(f"{given} can't be read: {error}", "give a JSON file (docs/eplb.md)") from error
    if not isinstance(found, dict):
        raise _refused(f"{given} holds no JSON object", "see docs/eplb.md for the format")
    return found


def _refused(what: str, fix: str) -> ValueError:
    return ValueError(f"additional_config: expert_map: {what}; {fix}")


def settle(config: VllmConfig) -> None:
    """Reads the engine's map, checks it against model and ranks, and puts what it holds in the place of the file's
    name: all ranks then have the same map, and vLLM's compile cache is of this one.

    Raises:
        ValueError: it is none for this model, or what is to become of it contradicts other options.
    """
    additional = config.additional_config
    if not isinstance(additional, dict):
        return
    if additional.get("expert_rebalance"):
        _check_rebalance(config, additional)
    if not additional.get("expert_map"):
        return
    refuse_without_ranks(config, "expert_map")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "additional_config: expert_map and --pipeline-parallel-size exclude each other: the map counts the layers "
            "that have experts, and a stage does not know how many lie in front of its own; leave one of the two out"
        )
    found = dict(content(additional["expert_map"]))
    maps_of(found, config.model_config.get_num_experts(), _ranks(config))
    additional["expert_map"] = found


def _check_rebalance(config: VllmConfig, options: Mapping[str, Any]) -> None:
    refuse_without_ranks(config, "expert_rebalance")
    redundant, parallel = options["expert_rebalance"].get("redundant", 0), config.parallel_config
    if parallel.data_parallel_size > 1 and parallel.distributed_executor_backend == "external_launcher":
        raise ValueError(
            "additional_config: expert_rebalance and --distributed-executor-backend external_launcher exclude each "
            "other with several data-parallel ranks: one without tokens then takes part in a step unseen, and would "
            "not move its experts; leave the backend out, and vLLM starts the ranks"
        )
    if options.get("compile", {}).get("freeze"):
        raise ValueError(
            "additional_config: expert_rebalance and the compile option freeze exclude each other: programs would keep "
            "what they computed from weights that move; leave one of the two out"
        )
    if options.get("expert_map"):
        if redundant:
            raise ValueError(
                "additional_config: expert_rebalance: redundant and expert_map contradict each other: the map says how "
                "many slots there are; leave redundant out"
            )
        return
    experts, ranks = config.model_config.get_num_experts(), _ranks(config)
    if (experts + redundant) % ranks or redundant > experts * (ranks - 1):
        raise ValueError(
            f"additional_config: expert_rebalance: {experts} experts and {redundant} redundant ones can't be spread "
            f"over {ranks} ranks, as many on each and none twice on one; give redundant another number, "
            f"{-experts % ranks} or more in steps of {ranks}, up to {experts * (ranks - 1)}"
        )


def refuse_without_ranks(config: VllmConfig, option: str) -> None:
    """Raises ValueError where experts are not spread over ranks as `option` needs it."""
    model, parallel = config.model_config, config.parallel_config
    lacks = [
        (model is None or not model.is_moe, "a mixture of experts"),
        (not parallel.enable_expert_parallel, "--enable-expert-parallel"),
        (_ranks(config) < 2, "--tensor-parallel-size or --data-parallel-size of at least 2"),
        (parallel.expert_placement_strategy != "linear", "--expert-placement-strategy linear, which is the default"),
    ]
    missing = [what for absent, what in lacks if absent]
    if missing:
        raise ValueError(
            f"additional_config: {option} needs {' and '.join(missing)}: it says which rank has which whole experts; "
            f"give that, or leave {option} out"
        )


def _ranks(config: VllmConfig) -> int:
    """How many ranks the experts are spread over."""
    return config.parallel_config.tensor_parallel_size * config.parallel_config.data_parallel_size


def recorded(maps: Sequence[ExpertMap]) -> dict[str, Any]:
    """The content of a file that says the same."""
    return {
        "moe_layer_count": len(maps),
        "layer_list": [
            {
                "layer_id": number,
                "device_count": len(one.ranks),
                "device_list": [
                    {"device_id": rank, "device_expert": list(experts)} for rank, experts in enumerate(one.ranks)
                ],
            }
            for number, one in enumerate(maps)
        ],
    }
