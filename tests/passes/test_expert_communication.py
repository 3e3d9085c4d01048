"""expert_communication: what the table says, what is rewritten, what is refused. Ranks are threads (tests/world.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from npu_compiler import fusion_kernels
from npu_compiler.config import Options
from npu_compiler.errors import OptionError
from npu_compiler.passes import expert_choice, expert_communication, pipeline
from npu_compiler.passes.expert_choice import ALLGATHER, ALLTOALL, FUSED_MC2, MC2, Step, choose
from npu_compiler.passes.record import Pass, PassRecord
from npu_compiler.plan import agreement
from tests import world
from tests.experts import Case
from tests.passes import test_token_drop as experts
from tests.passes.lowered import apply, calls

REDUCE = "_c10d_functional.all_reduce.default"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    fusion_kernels.register()


# -- the table ---------------------------------------------------------------------------------------------------------


def step(soc: str, ranks: int = 16, each: int = 8, tokens: int = 64, captured: int = 64, top_k: int = 8) -> Step:
    return Step(tokens, 0, ranks, ranks * each, top_k, soc, captured)


RULE = (  # the reference's rule, worked out by hand
    (step("310P"), ALLGATHER),
    (step("A2"), MC2),
    (step("A2", ranks=8), ALLGATHER),
    (step("A2", each=25), ALLGATHER),
    (step("A2", tokens=65), ALLGATHER),
    (step("A3", ranks=2), MC2),
    (step("A3", ranks=2, tokens=65), ALLTOALL),
    (step("A3", ranks=2, tokens=1024, captured=4096), MC2),  # 2 * 512
    (step("A3", ranks=2, tokens=1025, captured=4096), ALLTOALL),
    (step("A3", ranks=16, tokens=64, captured=50), MC2),  # a full share for each rank: 16 * 4
    (step("A5", ranks=2), MC2),
    (step("A5", ranks=8, tokens=65), ALLGATHER),
    (step("A5", ranks=9, tokens=65, captured=63), ALLTOALL),
    (step("", ranks=2), ALLGATHER),
)


@pytest.mark.parametrize(
    ("given", "method"), RULE, ids=[f"{given.soc}-{index}" for index, (given, _) in enumerate(RULE)]
)
def test_the_table(given: Step, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_choice, "MISSING", {})
    assert choose(given).method == method


def test_what_can_not_run_is_passed_over_with_the_reason() -> None:
    choice = choose(step("A3", ranks=2), here={MC2: "no group"})
    assert choice.method == ALLTOALL
    assert str(choice) == "ALLTOALL (A3: what MC2 does not take; MC2 not: no group)"


def test_unknown_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_choice, "MISSING", {})
    choice = choose(step("A3", ranks=2, captured=0))
    assert choice.method == ALLTOALL
    assert choice.passed_over == ("MC2 not: MC2's capacity is not known",)


def test_the_most_tokens_of_a_call_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_choice, "MISSING", {})
    for most, method in ((64, MC2), (65, ALLTOALL)):
        assert choose(Step(1, most, 2, 8, 2, "A3", 64)).method == method


# -- the rewrite -------------------------------------------------------------------------------------------------------


def rewritten(case: Case, dynamic: bool = False, **settings: Any) -> tuple[list[Any], list[Any], PassRecord]:
    """The program of each rank, without and with the pass; and what the pass noted on rank 0."""
    programs, results, records = [], [], []
    for rank in range(case.ranks):
        with world.group_of(case.ranks, rank), torch.no_grad():
            made = make_fx(experts.layer(rank, case.ranks), tracing_mode="symbolic" if dynamic else "fake")
            programs.append(made(*experts.inputs(case, rank)))
            results.append(copy.deepcopy(programs[-1]))
            run = lambda module, record: expert_communication.run(module, record, **settings)  # noqa: E731
            records.append(apply(Pass(expert_communication.NAME, "", run), results[-1]))
    return programs, results, records[0]


@pytest.mark.parametrize(("ranks", "tokens", "kind"), [(2, 12, "skewed"), (2, 1, "random"), (4, 7, "skewed")])
@pytest.mark.parametrize("settings", [{"asked": ALLTOALL}, {"soc": "A3"}], ids=["asked", "A3"])
def test_the_same_bits_by_all_to_all(ranks: int, tokens: int, kind: str, settings: dict[str, Any]) -> None:
    """Of routings that send a rank far more than its share, too: the buffers always suffice."""
    case = Case(ranks, experts.EXPERTS, experts.K, tokens, kind, 1.0)
    before, after, record = rewritten(case, dynamic=tokens > 1, **settings)
    (fired,) = record.fired
    assert fired.rule.startswith("expert_communication: ALLTOALL (")
    assert fired.rule.endswith(f", 4 experts on {ranks} ranks, 2 a token")
    found = calls(after[0])
    assert [found.count(name) for name in (experts.DISPATCH, experts.COMBINE, REDUCE)] == [1, 1, 0]
    for got, exact in zip(experts.run(after, case), experts.run(before, case), strict=True):
        assert torch.equal(got, exact), "two experts a token: the sum has no other order"


def test_what_stays_has_the_choice_in_the_report() -> None:
    case = Case(2, experts.EXPERTS, experts.K, 12, "random", 1.0)
    before, after, record = rewritten(case, soc="A2", captured=16)
    assert not record.fired
    assert [entry.reason for entry in record.refused] == [
        "ALLGATHER (A2: what MC2 does not take; MC2 not: 2 ranks, fewer than 16), 4 experts on 2 ranks, 2 a token"
    ]
    assert calls(after[0]) == calls(before[0])


def test_a_shared_expert_is_no_input_that_ranks_have_to_share() -> None:
    """It is each rank's own part, and meets the tokens when these are whole again."""
    with world.group_of(2), torch.no_grad():
        program = program_of(experts.with_shared_expert(0, 2))
        apply(Pass("", "", lambda module, record: expert_communication.run(module, record, asked=ALLTOALL)), program)
        assert experts.UNSHARD in calls(program)
        assert agreement.planned(program.graph)["0"].equal == ()


def program_of(function: Any) -> fx.GraphModule:
    case = Case(2, experts.EXPERTS, experts.K, 12, "random", 1.0)
    return make_fx(function, tracing_mode="fake")(*experts.inputs(case, 0))


def test_nothing_is_chosen_where_nothing_is_sent() -> None:
    with world.group_of(2), torch.no_grad():
        record = apply(Pass("", "", expert_communication.run), program_of(experts.all_experts))
    assert [entry.reason for entry in record.refused] == ["nothing is sent: all experts are on this rank"]


@pytest.mark.parametrize("method", [ALLTOALL, MC2])
@pytest.mark.parametrize(
    ("layer", "reader"), [(experts.not_summed, "output"), (experts.of_all_engines, "reduce_scatter_tensor")]
)
def test_another_form_stays_or_is_refused_by_name(layer: experts.Program, reader: str, method: str) -> None:
    with world.group_of(2), torch.no_grad():
        record = apply(Pass("", "", expert_communication.run), program_of(layer))
        assert record.refused[0].reason.startswith(f"ALLGATHER stays: {reader} reads the experts' results")
        with pytest.raises(OptionError, match=f"expert_communication='{method}' can't be done: {reader} reads"):
            expert_communication.run(program_of(layer), PassRecord(""), asked=method)


@pytest.mark.parametrize("method", [MC2, FUSED_MC2])
def test_a_method_that_can_not_run_is_refused_by_name(method: str) -> None:
    case = Case(2, experts.EXPERTS, experts.K, 12, "random", 1.0)
    with pytest.raises(OptionError, match=f"expert_communication='{method}' can't be done: "):
        rewritten(case, asked=method)


# -- the options -------------------------------------------------------------------------------------------------------


def test_token_drop_takes_its_place() -> None:
    names = pipeline.names(pipeline.selected(Options.of({"token_drop": {"capacity_factor": 1.5}})))
    assert expert_communication.NAME not in names
    assert expert_communication.NAME in pipeline.names(pipeline.selected(Options()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"expert_communication": "all_to_all"}, "did you mean 'alltoall'"),
        ({"expert_tokens": -1}, "expert_tokens=-1 is no number of tokens"),
        ({"expert_communication": "mc2", "token_drop": {"capacity_factor": 1.5}}, "contradict each other"),
    ],
)
def test_options_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.of(given)
