"""The peers compute the decode step of the model that they compete with; the harness picks the best of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decode_model, harness, peers
from benchmarks import row_decode_step as decode
from benchmarks.harness import Contestant, Goal, Missing, Row, Settings
from tests.benchmarks.test_decode_model import SMALL

CASE = decode.Case(SMALL)


def by_hand(model: torch.nn.Module, arguments: peers.Arguments, dtype: torch.dtype) -> peers.Run:
    return lambda: model(*arguments)


@torch.inference_mode()
def test_a_read_only_step_is_the_same_step_and_its_rows_land_in_the_cache() -> None:
    model, (tokens, position) = CASE.model(), decode_model.inputs(SMALL)
    caches = decode_model.caches(model)
    before = caches.clone()
    run = by_hand(decode_model.ReadOnlyStep(model), (tokens, position, *caches.flatten(0, 1)), torch.float32)
    step = peers.in_place(run, caches, int(position))
    torch.testing.assert_close(step(), model(tokens, position), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches, decode_model.caches(model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(caches, before)
    torch.testing.assert_close(step(), model(tokens, position), rtol=1e-5, atol=1e-5)


def test_bound_steps_compute_the_step() -> None:
    """Inputs are read where they lie, and the output lies in the graph's own memory."""
    right, found = decode.on_cpu("cpu eager", CASE, compiled=False)(), decode.on_npu("ascend", CASE, "ascend", True)()
    assert right.output is not None and found.output is not None
    for _ in range(2):
        torch.testing.assert_close(found.output(), right.output(), rtol=1e-4, atol=1e-4)
        found.batch(3)


@pytest.mark.full
@pytest.mark.parametrize("peer", [peers.onnx_runtime, peers.openvino, peers.aot_inductor])
def test_installed_peers_compute_the_step(peer: peers.Peer) -> None:
    try:
        given = decode.read_only("peer", CASE, peer, torch.float32)()
    except Missing as reason:
        pytest.skip(str(reason))
    right = decode.on_cpu("cpu eager", CASE, compiled=False)()
    for _ in range(2):  # the second one reads the rows that the first one wrote
        torch.testing.assert_close(given.output(), right.output(), rtol=1e-4, atol=1e-4)


def test_a_peer_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(Missing, match="no_such_peer is not installed; `make bench` installs it"):
        peers.installed("no_such_peer")


def test_goals_against_the_best_rival_and_the_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"own": 1e-3, "quick": 1.5e-3, "slow": 3e-3, "no rival": 1e-4}
    contestants = {name: lambda name=name: Contestant(name, lambda count: None) for name in names}
    goals = (Goal("own", faster_than=1.4), Goal("own", roof_share=0.9))
    row = Row("demo", "t", "ms", contestants, "own", goals, rivals=("slow", "quick"), roof=lambda: 0.95)
    seconds = {name: [value] * 3 for name, value in names.items()}
    monkeypatch.setattr(harness, "measure", lambda *_: harness.Measured(seconds, 0, False))
    own = harness.run(row, Settings.quick())[0]
    assert (own["best_rival"], own["best_ratio"], own["met"]) == ("quick", pytest.approx(1.5), True)
    assert own["goal"] == ">= 1.4x; 90% of the roof" and own["roof"] == 0.95
    seconds["quick"] = [1.2e-3] * 3
    assert harness.run(row, Settings.quick())[0]["met"] is False
