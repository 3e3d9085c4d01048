"""The features as data: how each is switched on, what it needs, what it excludes, how its work shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npu_compiler.serving.expert_maps import ExpertMap, recorded

KINDS = ("dense", "moe", "shared")
"""Models: without experts, with routed ones, with a shared expert beside these."""
MIXTURES = ("moe", "shared")
EXPERTS, LAYERS, HIDDEN = 4, 2, 128
"""Routed experts of a layer that has some; layers of a model, and columns, where no feature needs more."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """What one rank says about its run.

    Attributes:
        decode, other: steps by what they were (docs/serving.md, the run report).
        experts: how many experts of a layer it has; 0 for a dense model.
        fractal: how many of its parameters lie in FRACTAL_NZ.
        rows: of each layer with a map of its experts, how many were counted since it changed.
        moved: how many experts were given to another slot.
        routed, dropped: rows that buffers of a fixed size were for, and those of them that had no room.
        split: over how many engines weights of a kind are split, of which it has a part.
        streams: the most that a captured graph has; 0 without graphs.
        fired: how often each pass rewrote something, over all its programs. `left`: how often it left something.
        tensor, stage: its numbers among the ranks of tensor and of pipeline parallelism.
    """

    decode: Mapping[str, int]
    other: Mapping[str, int]
    experts: int
    fractal: int
    rows: Sequence[int]
    moved: int
    routed: int
    dropped: int
    split: Mapping[str, int]
    streams: int
    fired: Mapping[str, int]
    left: Mapping[str, int]
    tensor: int
    stage: int


Shows = Callable[[Sequence[Rank]], bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
    """A feature, or one choice among several (`axis`).

    Attributes:
        name: as in docs/parallel_pairs.md.
        shows: whether what the ranks say proves that it was on.
        settings: of the engine.
        compile: options of the compiler. `beside`: other values for them where it is on with the feature that each is
            for; `moe:NAME` for one kind of models only.
        plugin: other keys of additional_config, for so many ranks and layers.
        environment: variables of the ranks' processes.
        axis: features of one axis exclude each other by their nature ("graphs", "tensor"); empty: it has none.
        needs: axes of which one has to be chosen from, as it divides something over their ranks; empty: none.
        behind: features of which one has to be on, as it works on what they leave; empty: none.
        kinds: models that have what it works on.
        half: whether it works on half precision only.
        ranks: by how many it multiplies the number of ranks.
        layers: how many a stage has to have. `hidden`: how many columns the model.
        refused_with: features that start-up refuses beside it, with a part of the message; `moe:NAME` for one kind of
            models only.
        only_with: the features it is tried with; empty: all.
    """

    name: str
    shows: Shows
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compile: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    plugin: Callable[[int, int], Mapping[str, Any]] = lambda ranks, layers: {}
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    axis: str = ""
    needs: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    half: bool = False
    ranks: int = 1
    layers: int = 1
    hidden: int = HIDDEN
    refused_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only_with: tuple[str, ...] = ()


def _graphs(name: str, decode: str, other: str) -> Feature:
    """A graph mode, and what its decode steps and the steps with prefill have to be."""

    def shows(ranks: Sequence[Rank]) -> bool:
        return all(rank.decode[decode] > 0 and rank.other[other] > 0 for rank in ranks)

    config: dict[str, Any] = {"cudagraph_mode": name}
    if name != "NONE":
        config["cudagraph_capture_sizes"] = [1, 2, 4, 8]
    return Feature(name, shows, settings={"compilation_config": config}, axis="graphs")


def _each(numbers: Callable[[Rank], int], count: int) -> Shows:
    return lambda ranks: sorted({numbers(rank) for rank in ranks}) == list(range(count))


def _fired(name: str) -> Shows:
    return lambda ranks: all(rank.fired.get(name, 0) > 0 for rank in ranks)


def _fired_in_the_last_stage(name: str) -> Shows:
    """On all ranks of it. sequence_parallel leaves a stage in front of another that has as few layers as here, as it
    would have to gather the residual too (docs/parallel.md)."""

    def shows(ranks: Sequence[Rank]) -> bool:
        last = max(rank.stage for rank in ranks)
        return all(rank.fired.get(name, 0) > 0 for rank in ranks if rank.stage == last)

    return shows


def _exchanged_all(ranks: Sequence[Rank]) -> bool:
    """Each layer sent its rows in buffers of a fixed size, and all had room."""
    every = all(rank.fired.get("token_drop", 0) > 0 and not rank.left.get("token_drop", 0) for rank in ranks)
    return every and all(rank.routed > 0 and not rank.dropped for rank in ranks)


def _engines(count: int) -> Shows:
    return lambda ranks: len(ranks) % count == 0 and all(rank.decode["total"] > 0 for rank in ranks)


def _split(sizes: Mapping[str, int]) -> Shows:
    return lambda ranks: all(rank.split == sizes for rank in ranks)


_GRAPHS = ("eager", "NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY")
_COMPILES = {"eager": "contradict --enforce-eager"}
_BETWEEN_RANKS = {**_COMPILES, "data_parallel=2": "gather the tokens of all engines"}
_TAKE_SUMS = {**_COMPILES, "matmul_all_reduce": "both want the sums over the ranks"}
_OF_EXPERTS = (
    *_GRAPHS,
    *("tensor_parallel=2", "tensor_parallel=4", "pipeline_parallel=2", "data_parallel=2", "data_parallel=4"),
    *("expert_parallel", "expert_map", "expert_rebalance", "sequence_parallel", "attention_exchange"),
    *("matmul_all_reduce", "weight_nz", "layer_sharding", "dual_batch_overlap", "token_drop"),
    *("expert_communication=alltoall", "expert_communication=mc2", "fine_grained_tp", "shared_expert_rows"),
    "multistream",
)
"""What maps of experts are tried with."""
MAP = ExpertMap(((0, 2, 1), (3, 1, 0)), EXPERTS)
"""For two ranks: two experts have a replica, and neither rank its slots in the order of the experts."""
MAPS = {2: MAP, 4: ExpertMap(((0, 2, 1), (3, 1, 0), (2, 3, 0), (1, 3, 2)), EXPERTS)}
"""By the number of ranks; on 4 all experts have replicas."""
SPLIT = {"lm_head": 2, "o_proj": 2, "embedding": 2}
"""Over how many engines weights are split: of all kinds but dense MLPs, which these models don't have."""

FEATURES = (
    Feature(
        "eager",
        lambda ranks: all(rank.decode["eager"] > 0 and not rank.fired for rank in ranks),
        settings={"enforce_eager": True},
        axis="graphs",
    ),
    _graphs("NONE", decode="eager", other="eager"),
    _graphs("PIECEWISE", decode="piecewise", other="eager"),
    _graphs("FULL", decode="replayed", other="eager"),
    _graphs("FULL_DECODE_ONLY", decode="replayed", other="eager"),
    Feature(
        "tensor_parallel=2",
        _each(lambda rank: rank.tensor, 2),
        settings={"tensor_parallel_size": 2},
        axis="tensor",
        ranks=2,
    ),
    Feature(
        "tensor_parallel=4",
        _each(lambda rank: rank.tensor, 4),
        settings={"tensor_parallel_size": 4},
        axis="tensor",
        ranks=4,
        only_with=(
            *("FULL_DECODE_ONLY", "expert_parallel", "sequence_parallel", "attention_exchange", "layer_sharding"),
            *("weight_nz", "matmul_all_reduce", "dual_batch_overlap", "expert_map", "expert_rebalance", "token_drop"),
            *("expert_communication=alltoall", "expert_communication=mc2", "shared_expert_rows", "multistream"),
        ),
    ),
    Feature(
        "pipeline_parallel=2",
        _each(lambda rank: rank.stage, 2),
        settings={"pipeline_parallel_size": 2},
        axis="pipeline",
        ranks=2,
    ),
    Feature(
        "pipeline_parallel=4",
        _each(lambda rank: rank.stage, 4),
        settings={"pipeline_parallel_size": 4},
        axis="pipeline",
        ranks=4,
        only_with=(*_GRAPHS, "weight_nz"),
    ),
    Feature(
        "data_parallel=2",
        _engines(2),
        settings={"data_parallel_size": 2},
        axis="data",
        ranks=2,
    ),
    Feature(
        "data_parallel=4",
        _engines(4),
        settings={"data_parallel_size": 4},
        axis="data",
        ranks=4,
        only_with=(*_GRAPHS, "expert_parallel", "weight_nz", "expert_map", "expert_rebalance"),
    ),
    Feature(
        "expert_parallel",
        lambda ranks: all(0 < rank.experts < EXPERTS for rank in ranks),
        settings={"enable_expert_parallel": True},
        needs=("tensor", "data"),
        kinds=MIXTURES,
    ),
    Feature(
        "sequence_parallel",
        _fired_in_the_last_stage("sequence_parallel"),
        compile={"sequence_parallel": 1},
        needs=("tensor",),
        refused_with=_TAKE_SUMS,
    ),
    Feature(
        "attention_exchange",
        _fired("attention_exchange"),
        compile={"attention_exchange": 1},
        needs=("tensor",),
        refused_with=_TAKE_SUMS,
        only_with=(
            *("eager", "FULL", "FULL_DECODE_ONLY"),  # elsewhere programs end at attention, and it has nothing to do
            *("tensor_parallel=2", "tensor_parallel=4", "pipeline_parallel=2", "data_parallel=2", "expert_parallel"),
            *("sequence_parallel", "matmul_all_reduce", "weight_nz", "expert_map", "expert_rebalance"),
            *("layer_sharding", "dual_batch_overlap", "token_drop", "expert_communication=alltoall"),
            *("expert_communication=mc2", "shared_expert_rows", "multistream"),
        ),
    ),
    Feature(
        "layer_sharding",
        _fired("layer_sharding"),
        compile={"layer_sharding": True},
        needs=("tensor",),
        behind=("attention_exchange", "shared_expert_rows"),
        layers=4,  # of three on two ranks each rank would have two, and one on its way
        refused_with=_COMPILES,
        only_with=(
            *("eager", "FULL", "FULL_DECODE_ONLY", "tensor_parallel=2", "tensor_parallel=4", "pipeline_parallel=2"),
            *("data_parallel=2", "sequence_parallel", "attention_exchange", "dual_batch_overlap", "weight_nz"),
            *("expert_parallel", "expert_map", "expert_rebalance", "token_drop", "expert_communication=alltoall"),
            *("expert_communication=mc2", "shared_expert_rows", "multistream"),
        ),
    ),
    Feature(
        "dual_batch_overlap",
        _fired("dual_batch_overlap"),
        compile={"dual_batch_overlap": 2},
        beside={  # these take sums, from their number of rows on; with token_drop no layer of experts has another
            "sequence_parallel": {"sequence_parallel": 16},
            "moe:attention_exchange": {"attention_exchange": 16},
        },
        needs=("tensor",),
        refused_with=_TAKE_SUMS,
    ),
    Feature(
        "matmul_all_reduce",
        _fired("matmul_all_reduce"),
        compile={"matmul_all_reduce": 1},
        needs=("tensor",),
        half=True,
        refused_with=_COMPILES,
    ),
    Feature(
        "weight_nz",
        lambda ranks: all(rank.fractal > 0 for rank in ranks),
        compile={"weight_nz": "all"},
        half=True,
        refused_with=_COMPILES,
    ),
    Feature(
        "expert_map",
        lambda ranks: all(rank.experts == MAP.each and rank.rows == ranks[0].rows for rank in ranks),
        settings={"enable_expert_parallel": True},
        plugin=lambda ranks, layers: {"expert_map": recorded([MAPS[ranks]] * layers)},
        needs=("tensor", "data"),
        kinds=MIXTURES,
        refused_with={"pipeline_parallel=2": "expert_map and --pipeline-parallel-size exclude each other"},
        only_with=_OF_EXPERTS,
    ),
    Feature(
        "expert_rebalance",
        lambda ranks: all(rank.moved > 0 for rank in ranks),
        settings={"enable_expert_parallel": True},
        plugin=lambda ranks, layers: {"expert_rebalance": {"interval": 4, "least_gain": 0.0}},
        needs=("tensor", "data"),
        kinds=MIXTURES,
        only_with=_OF_EXPERTS,
    ),
    Feature(
        "token_drop",
        _exchanged_all,
        settings={"enable_expert_parallel": True},
        compile={"token_drop": {"max_drop_ratio": 0.0}},
        axis="exchange",
        needs=("tensor",),
        kinds=MIXTURES,
        refused_with=_BETWEEN_RANKS,
    ),
    Feature(
        "expert_communication=alltoall",
        _fired("expert_communication"),
        settings={"enable_expert_parallel": True},
        compile={"expert_communication": "alltoall"},
        axis="exchange",
        needs=("tensor",),
        kinds=MIXTURES,
        refused_with=_BETWEEN_RANKS,
    ),
    Feature(
        "expert_communication=mc2",
        _fired("expert_communication"),
        settings={"enable_expert_parallel": True},
        compile={"expert_communication": "mc2"},
        environment={"NPU_COMPILER_HOST": "soc=Ascend910_9391"},  # an A3: other chips have no MC2 for two ranks
        axis="exchange",
        needs=("tensor",),
        kinds=MIXTURES,
        half=True,
        hidden=1024,
        refused_with=_BETWEEN_RANKS,
        only_with=tuple(name for name in _OF_EXPERTS if name != "matmul_all_reduce"),  # which A3 does not have
    ),
    Feature(
        "fine_grained_tp",
        _split(SPLIT),
        plugin=lambda ranks, layers: {"fine_grained_tp": SPLIT},
        needs=("data",),
        kinds=MIXTURES,
        refused_with=dict.fromkeys(("tensor_parallel=2", "pipeline_parallel=2"), "it is for engines of one rank"),
        only_with=(
            *_GRAPHS,
            *("tensor_parallel=2", "pipeline_parallel=2", "data_parallel=2", "expert_parallel", "weight_nz"),
            *("expert_map", "expert_rebalance", "multistream"),
        ),
    ),
    Feature(
        "shared_expert_rows",
        _fired_in_the_last_stage("shared_expert_rows"),
        compile={"shared_expert_rows": 1},
        needs=("tensor",),
        behind=("sequence_parallel",),
        kinds=("shared",),
        refused_with=_TAKE_SUMS | _BETWEEN_RANKS,
    ),
    Feature(
        "multistream",
        lambda ranks: all(rank.streams > 1 for rank in ranks),
        compile={"multistream": "auto"},
        kinds=("shared",),
        refused_with={**_COMPILES, "NONE": "cudagraph_mode NONE captures nothing"},
    ),
)
BY_NAME = {feature.name: feature for feature in FEATURES}
