"""torch.compile(backend="npugraph_ex") of the unmodified torch_npu wheel, on the host runtime, against transformers."""

from __future__ import annotations

import pytest

from tests.peers.peer_process import run_checks

CHECKS = [
    "check_plain_decode",
    "check_fused_decode",
    "check_two_batch_sizes",
    "check_force_eager",
    "check_attention_lengths_are_updated",
    "check_captures_for_ascend",
    "check_host_scalars_are_not_captured",
    "check_copies_to_the_host_are_refused",
    "check_examples_of_the_page",
    "check_unknown_option_is_refused",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(tmp_path_factory.mktemp("peer") / "results.json", "npugraph_ex", CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_npugraph_ex(check: str, results: dict[str, str]) -> None:
    assert results[check] == "", results[check]
