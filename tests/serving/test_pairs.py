"""Features of several ranks beside each other: what start-up refuses, which starts try all pairs, and some of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest

from tests.serving.pairs import page, plan, refusals, start, texts
from tests.serving.pairs.__main__ import waiting
from tests.serving.pairs.features import BY_NAME, FEATURES, Rank
from tests.serving.pairs.plan import Pair, Start

IN_DEFAULT_RUN = ("dense:FULL_DECODE_ONLY+pipeline_parallel=2",)


@pytest.fixture(scope="module")
def said() -> dict[Pair, str]:
    return refusals.said()


def test_start_up_refuses_the_pairs_that_are_illegal_and_no_others(said: dict[Pair, str]) -> None:
    for pair in plan.pairs():
        expected = plan.refusal(pair.start)
        if expected:
            assert re.search(expected, said.get(pair, "")), pair
        else:
            assert pair not in said
    assert 0 < len(said) < len(plan.pairs())


def test_few_starts_try_every_legal_pair() -> None:
    legal = {pair for pair in plan.pairs() if not plan.refusal(pair.start)}
    starts = list(plan.covering(sorted(legal)))
    assert set().union(*map(plan.pairs_of, starts)) >= legal
    assert len(starts) < len(legal) / 2
    assert not [one for one in starts if plan.refusal(one)]


def test_starts_are_found_again_by_their_names() -> None:
    for pair in plan.pairs():
        assert Start.parse(str(pair.start)) == pair.start


def row(name: str, outcome: str) -> dict[str, object]:
    return {"start": name, "outcome": outcome, "reason": "why", "compiler": "now", "seconds": 1.0}


def test_after_a_failure_pairs_are_tried_one_by_one() -> None:
    """A start that failed says nothing of its pairs; one that was equal shows all of them."""
    several = [one for one in plan.covering(plan.pairs()) if len(plan.pairs_of(one)) > 1]
    good, bad = map(str, several[3:5])
    rows = {good: row(good, "equal"), bad: row(bad, "different")}
    known = page.states(list(rows.values()), {})
    assert {known[pair] for pair in plan.pairs_of(Start.parse(good))} == {"equal"}
    left = waiting(rows, None, "now")
    for pair in plan.pairs_of(Start.parse(bad)):
        if known[pair] != "equal":
            assert pair.start in left
    everything = waiting({}, None, "now")
    assert waiting(rows, "all", "now") == everything
    assert waiting({good: row(good, "equal")}, "stale", "later") == everything


def test_the_page_tells_a_pair_that_fails_by_itself() -> None:
    pair = next(pair for pair in plan.pairs() if not plan.refusal(pair.start))
    text = page.page([row(str(pair.start), "different")], {}, "now")
    assert f"- {pair.left} with {pair.right} ({pair.kind}): different: why" in text
    assert "1 different" in text


def test_the_page_says_which_starts_are_of_the_present_compiler() -> None:
    pairs = [pair for pair in plan.pairs() if not plan.refusal(pair.start)]
    text = page.page([row(str(pairs[0].start), "equal"), row(str(pairs[1].start), "equal")], {}, "now")
    assert "2 of 2 were made with the compiler as it was when this page was written (`now`)" in text
    assert "0 of 2 were made" in page.page([row(str(pair.start), "equal") for pair in pairs[:2]], {}, "later")
    assert f"| 1 | {pairs[0].start} | 1 | now |" in text


def test_four_stages_have_a_layer_each() -> None:
    assert Start.parse("dense:FULL+pipeline_parallel=2").layers == 2
    four = Start.parse("dense:FULL+pipeline_parallel=4")
    assert (four.layers, four.ranks) == (4, 4)
    assert texts.folder("dense", 4) != texts.folder("dense")


def test_experts_are_spread_over_engines_too() -> None:
    """Where engines share them, tensor parallelism is not needed."""
    assert Pair("moe", "data_parallel=2", "expert_map").start.ranks == 2
    assert Pair("moe", "FULL", "expert_map").start.names == {"FULL", "tensor_parallel=2", "expert_map"}
    both = Start.parse("moe:tensor_parallel=2+data_parallel=2+expert_map").settings()["additional_config"]
    assert len(both["expert_map"]["layer_list"][0]["device_list"]) == 4


def test_weights_are_split_over_engines_of_one_rank() -> None:
    for other in ("FULL", "expert_parallel", "weight_nz"):
        assert Pair("moe", other, "fine_grained_tp").start.names == {other, "data_parallel=2", "fine_grained_tp"}
    assert plan.refusal(Pair("moe", "tensor_parallel=2", "fine_grained_tp").start)


def test_layers_are_enough_for_each_stage_to_spread_them() -> None:
    assert Start.parse("dense:tensor_parallel=2+attention_exchange+layer_sharding").layers == 4
    assert Start.parse("dense:tensor_parallel=2+pipeline_parallel=2+attention_exchange+layer_sharding").layers == 8


def test_a_feature_brings_what_it_works_behind() -> None:
    alone = Pair("dense", "tensor_parallel=2", "layer_sharding").start
    assert alone.names == {"tensor_parallel=2", "attention_exchange", "layer_sharding"}
    shared = Pair("shared", "layer_sharding", "shared_expert_rows").start
    assert shared.names == {"tensor_parallel=2", "sequence_parallel", "layer_sharding", "shared_expert_rows"}


def test_options_beside_other_features() -> None:
    """dual_batch_overlap would find no sums if sequence_parallel took those of all steps."""

    def compiled(name: str) -> object:
        return Start.parse(name).settings()["additional_config"]["compile"]

    assert compiled("dense:tensor_parallel=2+sequence_parallel") == {"sequence_parallel": 1}
    both = compiled("dense:tensor_parallel=2+sequence_parallel+dual_batch_overlap")
    assert both == {"sequence_parallel": 16, "dual_batch_overlap": 2}
    for kind, rows in (("dense", 1), ("moe", 16)):
        found = compiled(f"{kind}:tensor_parallel=2+attention_exchange+dual_batch_overlap")
        assert found == {"attention_exchange": rows, "dual_batch_overlap": 2}


def test_mc2_is_served_on_the_chip_and_the_sizes_that_it_takes() -> None:
    start = Pair("moe", "tensor_parallel=2", "expert_communication=mc2").start
    assert (start.environment, start.hidden, start.dtype) == (
        {"NPU_COMPILER_HOST": "soc=Ascend910_9391"},
        1024,
        "float16",
    )
    assert not Start.parse("moe:FULL+tensor_parallel=2").environment
    assert texts.folder("moe", hidden=1024) != texts.folder("moe")


def test_the_model_with_a_shared_expert_is_for_what_works_on_it() -> None:
    own = {feature.name for feature in FEATURES if feature.kinds == ("shared",)}
    found = [pair for pair in plan.pairs() if pair.kind == "shared"]
    assert own and found and all({pair.left, pair.right} & own for pair in found)


def ranks(*fired: int) -> list[Rank]:
    """Of stages that follow one another: how often sequence_parallel rewrote something."""
    steps = {"total": 1}
    nothing = Rank(steps, steps, 0, 0, [], 0, 0, 0, {}, 0, {}, {}, 0, 0)
    return [
        dataclasses.replace(nothing, fired={"sequence_parallel": one}, stage=stage) for stage, one in enumerate(fired)
    ]


def test_sequence_parallel_has_to_show_in_the_last_stage() -> None:
    shows = BY_NAME["sequence_parallel"].shows
    assert shows(ranks(2)) and shows(ranks(0, 1))
    assert not shows(ranks(0)) and not shows(ranks(1, 0))


def test_token_drop_has_to_send_rows_and_drop_none() -> None:
    (silent,) = ranks(0)
    sent = dataclasses.replace(silent, fired={"token_drop": 2}, routed=8)
    shows = BY_NAME["token_drop"].shows
    assert shows([sent, sent])
    for wrong in ({"fired": {}}, {"left": {"token_drop": 1}}, {"routed": 0}, {"dropped": 1}):
        assert not shows([sent, dataclasses.replace(sent, **wrong)]), wrong


def test_weights_have_to_be_split_on_all_ranks() -> None:
    (whole,) = ranks(0)
    split = dataclasses.replace(whole, split={"lm_head": 2, "o_proj": 2, "embedding": 2})
    shows = BY_NAME["fine_grained_tp"].shows
    assert shows([split, split])
    assert not shows([split, whole])
    assert not shows([split, dataclasses.replace(whole, split={"lm_head": 2})])


def full() -> Iterator[object]:
    for one in plan.covering(plan.pairs()):
        if str(one) not in IN_DEFAULT_RUN:
            yield pytest.param(str(one), marks=pytest.mark.full)


@pytest.mark.parametrize("name", [*IN_DEFAULT_RUN, *full()])
def test_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in start.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    found = start.row(Start.parse(name))
    assert found["outcome"] == "equal", found["reason"] + found["traceback"]
