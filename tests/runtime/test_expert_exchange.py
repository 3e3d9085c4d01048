"""MoE dispatch and combine of the unmodified torch_npu over HCCL: processes against plain programs in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks

MODULE = "tests.runtime.expert_exchange_checks"


@pytest.fixture(scope="module", autouse=True)
def on_a3() -> Iterator[None]:
    """The operators of A2 want 16 ranks or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPU_COMPILER_HOST", "soc=Ascend910_9391")
        yield


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ranks.Reports:
    return ranks.start(MODULE, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("check", ranks.checks(MODULE))
def test_two_ranks(check: str, reports: ranks.Reports) -> None:
    ranks.passed(check, reports)


@pytest.mark.full
def test_four_ranks(tmp_path: Path) -> None:
    reports = ranks.start(MODULE, tmp_path, ranks=4)
    for check in ranks.checks(MODULE):
        ranks.passed(check, reports)


@pytest.mark.full
@pytest.mark.parametrize("scenario", ["compiled", "compiled_int8"])
def test_a_compiled_layer(scenario: str, tmp_path: Path) -> None:
    for results, errors in ranks.start(MODULE, tmp_path, scenario):
        assert results == {"error": ""}, results.get("error", errors[-3000:])


@pytest.mark.full
def test_a2_wants_sixteen_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_COMPILER_HOST", "soc=Ascend910B3")
    for results, errors in ranks.start(MODULE, tmp_path, "another_number_of_experts"):
        assert "has to be one of [16, 32, 64, 128, 256] on A2, not 2" in results["error"], errors[-2000:]


@pytest.mark.full
def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    (survivor, errors), (dead, _) = ranks.start(MODULE, tmp_path, "dead_rank")
    assert dead == {}
    assert "rank 1 (pid " in survivor["error"] and "is dead" in survivor["error"], survivor["error"] + errors[-2000:]
    assert "aclnnMoeDistributeDispatchV2 on rank 0" in survivor["error"]


@pytest.mark.full
def test_ranks_that_do_not_agree_are_named(tmp_path: Path) -> None:
    for results, errors in ranks.start(MODULE, tmp_path, "another_number_of_experts"):
        assert "the ranks run different collectives" in results["error"], errors[-2000:]
        assert "(6 experts, " in results["error"] and "(8 experts, " in results["error"]


@pytest.mark.full
def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    for results, errors in ranks.start(MODULE, tmp_path, "an_expert_that_is_not_there"):
        assert "expertIds has expert 6 for token 2, but there are 6" in results["error"], errors[-2000:]


@pytest.mark.full
def test_their_communicator_takes_nothing_else(tmp_path: Path) -> None:
    for results, errors in ranks.start(MODULE, tmp_path, "a_sum_in_the_communicator_of_experts"):
        assert "has run aclnnMoeDistributeDispatchV2 or CombineV2 before" in results["error"], errors[-2000:]
