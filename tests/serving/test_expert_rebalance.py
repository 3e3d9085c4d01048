"""Maps that change while a model is served: which map suits what experts got, what moves, and that nothing is captured
again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_compiler
from npu_compiler.backend import ascend
from npu_compiler.plan.weight_layout import FRACTAL_NZ
from npu_compiler.serving.expert_balance import balanced, rank_rows, replicas_for
from npu_compiler.serving.expert_loads import ExpertLoads
from npu_compiler.serving.expert_maps import ExpertMap, placed_in_turn, recorded, settle
from npu_compiler.serving.expert_moves import exchange, memory_of, moves
from npu_compiler.serving.expert_rebalance import LAG, Rebalancer
from npu_compiler.serving.options import ExpertRebalance, ServingOptions
from tests import world
from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, generate, graphs
from tests.serving.pairs import texts
from tests.serving.pairs.features import EXPERTS, MAP
from tests.serving.test_expert_maps import EP, RANKS, configuration, layer, maps
from tests.serving.test_moe import folder  # noqa: F401  # the same model

Tokens = list[list[int]]
LAYERS = checkpoints.Shape().layers


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[int], ExpertMap]:
    """A map, and rows of its experts, of which some got none and some nearly all."""
    one = draw(maps())
    return draw(st.lists(st.sampled_from([0, 1, 5, 40, 1000]), min_size=one.experts, max_size=one.experts)), one


# -- which map suits ---------------------------------------------------------------------------------------------------


@given(loads())
def test_a_new_map_is_one(given: tuple[list[int], ExpertMap]) -> None:
    """All experts have a slot, no rank has one twice, and each rank keeps its number of slots."""
    rows, old = given
    new = balanced(rows, old)
    assert maps_like(old, new)
    assert set(new.slots) == set(range(old.experts))
    assert all(len(set(rank)) == len(rank) for rank in new.ranks)


def maps_like(one: ExpertMap, other: ExpertMap) -> bool:
    return [len(rank) for rank in one.ranks] == [len(rank) for rank in other.ranks] and one.experts == other.experts


@given(loads())
def test_replicas_go_where_most_rows_are(given: tuple[list[int], ExpertMap]) -> None:
    """No other choice has a smaller largest replica: whoever got one had, without it, at least what is largest now."""
    rows, old = given
    ranks = len(old.ranks)
    counts = replicas_for(rows, len(old.slots), ranks)
    assert sum(counts) == len(old.slots) and min(counts) >= 1 and max(counts) <= ranks
    largest = max((rows[e] / counts[e] for e in range(len(rows)) if counts[e] < ranks), default=0)
    assert all(rows[e] / (counts[e] - 1) >= largest for e in range(len(rows)) if counts[e] > 1)


@given(loads())
def test_what_a_rank_keeps_stays_in_its_slot(given: tuple[list[int], ExpertMap]) -> None:
    rows, old = given
    new = balanced(rows, old)
    for before, after in zip(old.ranks, new.ranks, strict=True):
        kept = set(before) & set(after)
        assert [expert for expert in after if expert in kept] == [expert for expert in before if expert in kept]
        assert all(before[slot] == expert for slot, expert in enumerate(after) if expert in kept)


@given(loads())
def test_a_map_that_suits_stays(given: tuple[list[int], ExpertMap]) -> None:
    rows, old = given
    new = balanced(rows, old)
    assert balanced(rows, new) == new


@pytest.mark.parametrize(
    ("rows", "redundant", "most"),
    [
        ([90, 10, 10, 10], 0, 100),  # one expert is most of it, and can't be taken apart
        ([90, 10, 10, 10], 2, 60),  # 45 and 15, 45 and 15
        ([8, 7, 6, 5, 4, 3, 2, 1], 0, 18),
    ],
)
def test_examples(rows: list[int], redundant: int, most: int) -> None:
    new = balanced(rows, placed_in_turn(len(rows), 2, redundant))
    assert max(rank_rows(rows, new)) == most


# -- what moves --------------------------------------------------------------------------------------------------------


def weights_of(one: ExpertMap, rank: int) -> list[Tensor]:
    """Two weights that say which expert each slot has."""
    experts = torch.tensor(one.ranks[rank], dtype=torch.float32)
    return [experts.view(-1, 1, 1).expand(-1, 2, 3).contiguous(), -experts.view(-1, 1).expand(-1, 4).contiguous()]


@settings(max_examples=30)
@given(loads())
def test_weights_are_where_the_map_says(given: tuple[list[int], ExpertMap]) -> None:
    """On simulated ranks, within the same storage."""
    rows, old = given
    new = balanced(rows, old)
    steps = moves(old, new)
    assert [old.slots[step.source] for step in steps] == [new.slots[step.target] for step in steps]

    def moved(rank: int) -> list[Tensor]:
        weights = weights_of(old, rank)
        places = [weight.data_ptr() for weight in weights]
        exchange(weights, steps, rank, len(old.ranks))
        assert [weight.data_ptr() for weight in weights] == places
        return weights

    for rank, weights in enumerate(world.together(len(old.ranks), moved)):
        assert all(map(torch.equal, weights, weights_of(new, rank)))


def test_slots_of_a_fractal_weight() -> None:
    """Moved as they lie, without a conversion."""
    weight = torch.nn.Parameter(torch.randn(3, 32, 64, dtype=torch.float16).npu(), requires_grad=False)
    before = weight.cpu()
    torch.npu.config.allow_internal_format = True
    torch.ops.npu.npu_format_cast_(weight, FRACTAL_NZ)
    memory = memory_of(weight).view(3, -1)
    assert memory.data_ptr() == weight.data_ptr()
    memory[0].copy_(memory[2])
    assert torch.ops.npu.get_npu_format(weight) == FRACTAL_NZ
    assert weight.cpu().equal(before[[2, 1, 2]])


def test_a_captured_graph_sees_the_new_map() -> None:
    """Table and weights change in place: the ledger has no capture that was not there before."""
    made = layer(MAP, 0)
    made.w13_weight = torch.nn.Parameter(torch.arange(6.0).npu(), requires_grad=False)
    made.real_rows.fill_(4)

    def forward(experts: Tensor) -> Tensor:
        return made.w13_weight[made.slots_of(experts).long()]

    experts = torch.tensor([[0, 2], [0, 1], [3, 0], [1, 3]], dtype=torch.int32).npu()
    compiled = torch.compile(forward, backend="ascend")
    with torch.no_grad():
        for _ in range(3):
            found = compiled(experts)
        assert found.cpu().equal(torch.arange(6.0)[made.slots_of(experts).cpu().long()])
        ledger = ascend.compiled()[-1].ledger
        assert ledger is not None
        captures, replays = len(ledger.captures), ledger.replays
        new = ExpertMap(((0, 2, 3), (3, 1, 0)), EXPERTS)
        made.w13_weight[2].fill_(7.0)
        made.change(new)
        assert made._map_global_expert_id_to_local_expert_id(3) == 2
        assert made.slot_rows.sum().item() == 0, "counts begin again"
        found = compiled(experts)
        slots = torch.tensor(new.table()).view(EXPERTS, -1)
        rows = torch.arange(4).unsqueeze(1) % new.columns
        expected = slots[experts.cpu().long(), rows]
        assert found.cpu().equal(torch.tensor([0.0, 1, 7, 3, 4, 5])[expected])
        assert (len(ledger.captures), ledger.replays) == (captures, replays + 1), npu_compiler.report()


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rebalancer(monkeypatch: pytest.MonkeyPatch) -> Rebalancer:
    """Of one layer, on rank 0 of 2; its weights are sent to nobody, and nobody else counts."""
    found = ExpertLoads()
    found.layers = [layer(MAP, 0)]
    found.layers[0].layer_name = "layer"
    monkeypatch.setattr("npu_compiler.serving.expert_rebalance.exchange", lambda *_: None)
    monkeypatch.setattr("npu_compiler.serving.expert_rebalance.dist.broadcast", lambda *_, **__: None)
    group: Any = SimpleNamespace(ranks=[0, 1], rank_in_group=0, world_size=2, cpu_group=None, device_group=None)
    return Rebalancer(ExpertRebalance(interval=3), found, group)


def steps_until_moved(one: Rebalancer, rows: list[int]) -> int:
    """How many steps, each with these rows of the slots, until the map changes; 0: it does not."""
    (made,) = one._loads.layers
    before = made.placement
    for step in range(1, 3 * (3 + LAG)):
        one.between_steps()
        if made.placement is not before:
            return step
        made.slot_rows[:-1] += torch.tensor(rows).npu()
    return 0


def test_a_map_changes_after_the_interval(rebalancer: Rebalancer) -> None:
    assert steps_until_moved(rebalancer, [50, 50, 1, 1, 1, 1]) == 3 + LAG + 1
    rebalancer._loads.wait()
    (found,) = rebalancer._loads.latest
    assert found.moved > 0 and found.before == pytest.approx(2 * 101 / 104) and found.rows == 0


def test_an_even_load_moves_nothing(rebalancer: Rebalancer) -> None:
    assert steps_until_moved(rebalancer, [2, 1, 1, 1, 1, 2]) == 0
    assert steps_until_moved(rebalancer, [0] * 6) == 0


def test_counts_that_are_cleared_begin_again(rebalancer: Rebalancer) -> None:
    assert steps_until_moved(rebalancer, [2, 1, 1, 1, 1, 2]) == 0
    rebalancer._loads.clear()
    assert steps_until_moved(rebalancer, [50, 50, 1, 1, 1, 1]) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "expert_rebalance must be a JSON object, got 3"),
        ({"interval": 0}, "interval must be steps >= 1, got 0"),
        ({"redundant": 2}, "interval must be steps >= 1, got None"),
        ({"interval": 5, "redundant": -1}, "redundant must be experts >= 0, got -1"),
        ({"interval": 5, "least_gain": 1}, "least_gain must be 0 to 1, got 1"),
        ({"intervall": 5}, "unknown key 'intervall'; did you mean 'interval'"),
    ],
)
def test_wrong_settings_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions.parse({"expert_rebalance": given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_rebalance": {"interval": 5, "redundant": 1}},
            "4 experts and 1 redundant ones can't be spread over 2",
        ),
        ({"expert_rebalance": {"interval": 5, "redundant": 6}}, r"can't be spread .* up to 4"),
        (
            {"expert_rebalance": {"interval": 5, "redundant": 2}, "expert_map": recorded([MAP])},
            "redundant and expert_map contradict",
        ),
        ({"expert_rebalance": {"interval": 5}, "compile": {"freeze": True}}, "expert_rebalance and the compile option"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any], message: str) -> None:
    config = configuration()
    config.additional_config = options
    with pytest.raises(ValueError, match=message):
        settle(config)


def test_ranks_that_take_part_unseen_are_refused() -> None:
    config = configuration(data_parallel_size=2, distributed_executor_backend="external_launcher")
    config.additional_config = {"expert_rebalance": {"interval": 5}}
    with pytest.raises(ValueError, match="external_launcher exclude each other"):
        settle(config)


# -- a model -----------------------------------------------------------------------------------------------------------


def served(model: Path, prompts: Tokens, counts: list[int], compile: dict[str, Any], dtype: str = "float32") -> Tokens:
    """Tokens of all prompts, asked for twice, while maps change."""
    options = {"expert_rebalance": {"interval": 4, "redundant": 2, "least_gain": 0.0}, "compile": compile}
    given = {**EP, "dtype": dtype, "enable_prefix_caching": False, "additional_config": options}
    with engine(model, **given, **graphs("FULL_DECODE_ONLY", [1, 2, 4, 8])) as llm:
        captured = [len(data["graphs"]) for data in llm.collective_rpc("report")]
        found = generate(llm, prompts * 2, counts * 2)
        reports = llm.collective_rpc("report")
    assert [len(data["graphs"]) for data in reports] == captured, "nothing is captured again"
    for data in reports:
        assert data["decode_steps"]["replayed"] > 0 and data["decode_steps"]["eager"] == 0
        assert [entry["moved"] > 0 and entry["before"] > 1 for entry in data["experts"]] == [True] * LAYERS
    assert len(reports) == RANKS and reports[0]["experts"] == reports[1]["experts"]
    return found


@pytest.mark.parametrize("communication", ["auto", pytest.param("alltoall", marks=pytest.mark.full)])
def test_tokens_while_experts_move(communication: str, folder: Path) -> None:  # noqa: F811
    prompts = oracle.prompts()[:5]
    expected = [oracle.greedy(folder, prompt, 24) for prompt in prompts]
    found = served(folder, prompts, [24] * len(prompts), {"expert_communication": communication})
    assert found == expected * 2


@pytest.mark.full
def test_tokens_while_fractal_experts_move() -> None:
    """In float16, on prompts whose answers no rounding can change (tests/serving/pairs/texts.py)."""
    prompts, expected = texts.of("moe", "float16")
    found = served(texts.folder("moe"), prompts, [len(one) for one in expected], {"weight_nz": "all"}, "float16")
    assert found == expected * 2
