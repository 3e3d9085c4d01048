"""Maps of experts: what a file may say, which replica a token goes to, and tokens served with one."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import SchedulerStats

from npu_compiler.inspect.run import ExpertRows
from npu_compiler.serving.expert_imbalance import linear_owner, load_of
from npu_compiler.serving.expert_maps import ExpertMap, content, maps_of, placed_in_turn, recorded, settle
from npu_compiler.serving.metrics import StepMetrics, counted_of, stat_of
from npu_compiler.serving.options import ServingOptions
from npu_compiler.serving.routed_experts import NPURoutedExperts
from npu_compiler.serving.steps import Step
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.pairs import start
from tests.serving.pairs.features import EXPERTS, MAP
from tests.serving.test_moe import folder  # noqa: F401  # the same model

RANKS, LAYERS = 2, checkpoints.Shape().layers
EP = {"tensor_parallel_size": RANKS, "distributed_executor_backend": "mp", "enable_expert_parallel": True}


@st.composite
def maps(draw: st.DrawFn) -> ExpertMap:
    """Any map of up to 6 ranks: every expert somewhere, none twice on a rank."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    each = draw(st.integers(math.ceil(experts / ranks), experts))
    turned = draw(st.permutations(range(experts)))
    slots = [turned[slot % experts] for slot in range(each * ranks)]
    return ExpertMap(tuple(tuple(slots[rank * each : (rank + 1) * each]) for rank in range(ranks)), experts)


# -- the table ---------------------------------------------------------------------------------------------------------


@given(maps())
def test_replicas_take_turns(one: ExpertMap) -> None:
    table = torch.tensor(one.table()).view(one.experts, one.columns)
    for expert, slots in enumerate(one.replicas):
        assert [one.slots[slot] for slot in slots] == [expert] * len(slots)
        rows = Counter(table[expert, token % one.columns].item() for token in range(2 * one.columns))
        assert rows == dict.fromkeys(slots, 2 * one.columns // len(slots))


@given(maps())
def test_a_map_is_what_its_file_says(one: ExpertMap) -> None:
    said = json.loads(json.dumps(recorded([one, one])))
    assert maps_of(said, one.experts, len(one.ranks)) == [one, one]


def test_a_step_of_one_token_uses_several_ranks() -> None:
    first = MAP.table()[:: MAP.columns]
    assert [slot // MAP.each for slot in first] == [0, 1, 0, 1]  # of experts 0 and 1, whose replicas are on both


def layer(one: ExpertMap, rank: int, gathered: bool = False) -> NPURoutedExperts:
    made = object.__new__(NPURoutedExperts)
    torch.nn.Module.__init__(made)
    made._place(one, rank, gathered)
    return made.npu()


def test_slots_and_their_rows() -> None:
    made = layer(MAP, 1)
    assert made.slots_here == (3, 6)
    assert [made._map_global_expert_id_to_local_expert_id(expert) for expert in range(EXPERTS)] == [2, 1, -1, 0]
    experts = torch.tensor([[0, 2], [0, 1], [3, 0], [1, 1]], dtype=torch.int32)
    made.real_rows.fill_(3)
    found = made.slots_of(experts.npu()).cpu()
    assert torch.tensor(MAP.slots)[found].equal(experts.long())
    assert found[0, 0] != found[1, 0], "two tokens, two replicas"
    assert made.slot_rows[:-1].cpu().equal(torch.bincount(found[:3].view(-1), minlength=6)), "of real rows only"
    assert made.slot_rows[-1].item() == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_gathered_rows_without_their_padding(parts: int) -> None:
    """Rows of two engines with 5 and 0 real ones of 6; where an engine's ranks share them, each has its part."""
    generator = torch.Generator().manual_seed(parts)
    own = [torch.randint(EXPERTS, (6, 2), generator=generator, dtype=torch.int32) for _ in range(2)]
    gathered, each = [], 6 // parts
    for experts, real in zip(own, (5, 0), strict=True):
        for part in range(parts):
            made = layer(MAP, 0, gathered=True)
            made.real_rows.fill_(real)
            rows = experts[part * each : (part + 1) * each]
            gathered.append(made.marked(rows.npu(), part * each))
    found = made.slots_of(torch.cat(gathered)).cpu()
    rows = torch.arange(12).unsqueeze(1) % MAP.columns
    assert found.equal(torch.tensor(MAP.table()).view(EXPERTS, -1)[torch.cat(own).long(), rows].int())
    assert made.slot_rows[:-1].cpu().equal(torch.bincount(found[:5].view(-1), minlength=6)), "of real rows only"
    assert made.slot_rows[-1].item() == 2 * 7


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_imbalance() -> None:
    found = load_of("layer", [4, 0, 1, 3, 1, 3], MAP)
    # 5 and 7 rows; experts have 7, 2, 0 and 3
    assert found == ExpertRows(layer="layer", rows=12, imbalance=7 / 6, linear=9 / 6)
    assert load_of("layer", [0] * 6, MAP) == ExpertRows(layer="layer", rows=0, imbalance=0.0, linear=0.0)


@pytest.mark.parametrize(("experts", "ranks"), [(4, 2), (5, 2), (7, 3), (9, 4)])
def test_linear_is_vllms(experts: int, ranks: int) -> None:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    for rank in range(ranks):
        _, places, _ = determine_expert_map(ranks, rank, experts)
        assert places is not None
        assert [linear_owner(expert, experts, ranks) == rank for expert in range(experts)] == (places >= 0).tolist()


def test_metrics() -> None:
    metrics = StepMetrics(SimpleNamespace(model_config=SimpleNamespace(served_model_name="maps")))  # type: ignore[arg-type]
    now = [ExpertRows(layer="layer; counted", rows=10, imbalance=1.25, linear=1.5, moved=3, before=1.75)]
    stat = stat_of(Step(True, "FULL", 3, 4), (), now)
    assert counted_of(stat) == ([], now)
    metrics.record(SchedulerStats(cudagraph_stats=stat), None)
    labels = {"model_name": "maps", "engine": "0", "layer": "layer; counted"}
    names = ("expert_imbalance", "expert_imbalance_linear", "moved_experts", "expert_imbalance_before")
    assert [REGISTRY.get_sample_value(f"npu_compiler:{name}", labels) for name in names] == [1.25, 1.5, 3, 1.75]


# -- what is refused ---------------------------------------------------------------------------------------------------


def changed(**device: Any) -> dict[str, Any]:
    """The content of a file with a wrong second layer: its second device, or its numbers."""
    said = recorded([MAP, MAP])
    said["layer_list"][1]["device_list"][1] |= device
    return said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "no layer_list"),
        (recorded([MAP]) | {"moe_layer_count": 3}, "moe_layer_count is 3, and layer_list has 1 layers"),
        ({"layer_list": [recorded([MAP])["layer_list"][0] | {"layer_id": 2}]}, r"layer_id are \[2\]"),
        ({"layer_list": [3]}, "entry 0 of layer_list is 3"),
        (changed(device_expert=[3, 1, 7]), "layer 1, device 1: 7 is no expert; .* 0 to 3"),
        (changed(device_expert=[3, 1, True]), "layer 1, device 1: True is no expert"),
        (changed(device_expert=[3, 1, 3]), "layer 1, device 1 has expert 3 twice"),
        (changed(device_expert=[1, 0, 2]), "layer 1: expert 3 is on no device"),
        (changed(device_expert=[3, 1]), "layer 1: device 0 has 3 experts and device 1 has 2"),
        (changed(device_expert=[]), "layer 1, device 1 has no device_expert"),
        (changed(device_id=0), r"layer 1: device_id are \[0, 0\]"),
        (recorded([placed_in_turn(4, 4)]), "layer 0: device_count 4, device_list 4 long, for 2 ranks"),
    ],
)
def test_a_wrong_map_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"additional_config: expert_map: .*{message}"):
        maps_of(said, EXPERTS, RANKS)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, message in (("{", "can't be read"), ("[]", "holds no JSON object")):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            content(str(tmp_path / "map.json"))
    with pytest.raises(ValueError, match="can't be read"):
        content(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="expert_map must be a file name or a JSON object, got 3"):
        ServingOptions.parse({"expert_map": 3})


def configuration(**parallel: Any) -> Any:
    """The part of VllmConfig that `settle` reads."""
    sizes = {f"{kind}_parallel_size": 1 for kind in ("pipeline", "data")} | {"tensor_parallel_size": 2}
    usual = {"enable_expert_parallel": True, "expert_placement_strategy": "linear", **sizes}
    usual["distributed_executor_backend"] = "mp"
    return SimpleNamespace(
        additional_config={"expert_map": recorded([MAP])},
        model_config=SimpleNamespace(is_moe=True, get_num_experts=lambda: EXPERTS),
        parallel_config=SimpleNamespace(**(usual | parallel)),
    )


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"enable_expert_parallel": False}, "needs --enable-expert-parallel"),
        ({"tensor_parallel_size": 1}, "needs --tensor-parallel-size or --data-parallel-size of at least 2"),
        ({"expert_placement_strategy": "round_robin"}, "needs --expert-placement-strategy linear"),
        ({"data_parallel_size": 2}, "for 4 ranks"),
        ({"pipeline_parallel_size": 2}, "expert_map and --pipeline-parallel-size exclude each other"),
        ({"tensor_parallel_size": 4}, "for 4 ranks"),
    ],
)
def test_what_does_not_go_with_it(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settle(configuration(**parallel))


def test_a_file_becomes_its_content(tmp_path: Path) -> None:
    """So that all ranks have one map, and vLLM's cache key changes with it."""
    (tmp_path / "map.json").write_text(json.dumps(recorded([MAP])))
    config = configuration()
    config.additional_config["expert_map"] = str(tmp_path / "map.json")
    settle(config)
    assert config.additional_config["expert_map"] == recorded([MAP])


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("communication", ["auto", "alltoall"])
def test_tokens_with_redundant_experts(communication: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every token of every step is counted once for each of its experts, padding is not, and the figures are those of
    the map."""
    file = tmp_path / "map.json"
    file.write_text(json.dumps(recorded([MAP] * LAYERS)))
    prompts = oracle.prompts()[:4]
    expected = [oracle.greedy(folder, prompt, 16) for prompt in prompts]
    options = {"expert_map": str(file), "compile": {"expert_communication": communication}}
    settings = {**EP, "enable_prefix_caching": False, "additional_config": options, **graphs("FULL_DECODE_ONLY")}
    with engine(folder, **settings) as llm:
        assert generate(llm, prompts, 16) == expected
        reports = llm.collective_rpc("report")
    rows = 2 * (sum(map(len, prompts)) + len(prompts) * 15)  # two experts a token; the last token is not read
    assert len(reports) == RANKS
    assert reports[0]["experts"] == reports[1]["experts"]
    for data in reports:
        assert data["decode_steps"]["replayed"] > 0 and data["decode_steps"]["eager"] == 0
        assert [entry["rows"] for entry in data["experts"]] == [rows] * LAYERS
        assert all(1 <= entry["imbalance"] <= 2 and 1 <= entry["linear"] <= 2 for entry in data["experts"])
        names = [f"model.layers.{number}.mlp.experts" for number in range(LAYERS)]
        assert [entry["layer"] for entry in data["experts"]] == names


@pytest.mark.full
def test_rows_of_two_engines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """An engine pads its steps to those of the other one, and takes part without requests: neither is counted."""
    for key, value in start.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    prompts, counts = oracle.prompts()[:5], [20, 3, 9, 1, 5]
    expected = [oracle.greedy(folder, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    settings = {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_prefix_caching": False}
    options = {"expert_map": recorded([MAP] * LAYERS)}
    settings |= {"additional_config": options, **graphs("FULL_DECODE_ONLY")}
    assert start.replicated(folder, settings, prompts, counts, str(tmp_path)) == expected
    rows = 2 * (sum(map(len, prompts)) + sum(counts) - len(counts))  # two experts a token; the last token is not read
    said = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert [fact["rows"] for fact in said] == [[rows] * LAYERS] * RANKS
