"""`python -m benchmarks parallel`: what is counted and drawn for it, parts that fail or are there already, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import parallel, parallel_drop, parallel_layers, parallel_page
from benchmarks.__main__ import main
from benchmarks.harness import Measured
from npu_compiler import fusion_kernels

LAYER = {
    **{"peer": "sums", "rows": 8, "collectives": {"all_reduce": 2.0}, "bytes": 16384.0, "median": 100.0},
    **{"ratio": 1.0, "ratio_min": 0.9, "ratio_max": 1.1, "rounds": 9, "noisy": False},
}


@pytest.mark.parametrize("imbalance", parallel_drop.IMBALANCES)
def test_routing_has_the_imbalance_that_is_asked_for(imbalance: float) -> None:
    shape = parallel_drop.Shape(tokens=64)
    ids = parallel_drop.routed(shape, 2, imbalance)
    assert ids.shape == (64, 2) and bool((ids[:, 0] != ids[:, 1]).all()) and int(ids.max()) < shape.experts
    for source in ids.chunk(2):
        first = int((source < shape.experts // 2).sum())
        assert first == pytest.approx(imbalance * source.numel() / 2, abs=1)


def test_bytes_that_a_rank_sends() -> None:
    """4 ranks, rows of 32 float32; a dispatch of 2 tokens of 2 experts each has room for 4 rows for each rank."""
    fusion_kernels.register()
    graph, ops = fx.Graph(), torch.ops
    with FakeTensorMode():
        x, own = torch.empty(8, 32), torch.empty(2, 32)
        rows, ids, weights = torch.empty(16, 32), torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 2)
        order = torch.empty(16, dtype=torch.int32)
        came = (rows, torch.empty(16, 1, dtype=torch.int32), ids, weights)

    def given(value: torch.Tensor) -> fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    for target, args, result in (
        (ops._c10d_functional.all_reduce.default, (given(x), "sum", "0"), x),
        (ops.npu_fused.reduce_scatter_rows.default, (given(x), "0", 4), own),
        (ops.npu_fused.all_gather_rows.default, (given(own), "0", 4, 8), x),
        (
            ops.npu_fused.all_to_all_dispatch.default,
            (given(own), given(ids), given(weights), "0", 4, 8, 10000, "score", False, False, ""),
            came,
        ),
        (
            ops.npu_fused.all_to_all_combine.default,
            (given(rows), given(order), given(ids), given(weights), "0", 4),
            own,
        ),
    ):
        graph.call_function(target, args).meta["val"] = result
    counts, sent = parallel_layers.collectives(graph, 4)
    assert set(counts) == {
        *("all_reduce", "reduce_scatter_rows", "all_gather_rows", "all_to_all_dispatch", "all_to_all_combine")
    }
    row = 32 * 4
    whole = 2 * 6 * row + 6 * row + 6 * row  # of 8 rows: reduced and gathered, reduced, gathered
    assert sent == whole + 12 * (row + 4) + 12 * row


def test_gains_are_within_a_round() -> None:
    seconds = {"allgather": [2.0, 4.0, 3.0], "alltoall": [4.0, 2.0, 3.0], "capacity 1": [1.0, 2.0, 3.0]}
    found = parallel_drop.figures(Measured(seconds, 0, False), "capacity 1")
    assert found["milliseconds"] == 2000
    assert found["over_allgather"] == {"median": 2.0, "min": 1.0, "max": 2.0}
    assert found["over_alltoall"] == {"median": 1.0, "min": 1.0, "max": 4.0}


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measured(part: str, quick: bool) -> list[dict[str, Any]]:
        asked.append(part)
        if part == "dense" and len(asked) == 1:
            raise RuntimeError("rank 1: exit code 3")
        return [LAYER]

    monkeypatch.setattr(parallel, "measured", measured)
    command = ["parallel", "--quick", "--parts", "dense,experts", "--results", str(tmp_path)]
    assert main(command) == 1
    assert asked == ["dense", "experts"] and [file.name for file in tmp_path.iterdir()] == ["parallel_experts.json"]
    assert json.loads((tmp_path / "parallel_experts.json").read_text())["records"] == [LAYER]
    said = capsys.readouterr()
    assert "dense: rank 1: exit code 3" in said.err and "failed: dense\n" in said.err
    assert "| 8 | sums | 2 all_reduce | 16 | 100 | 1.00 (0.90 .. 1.10) |" in said.out
    assert main([*command, "--resume"]) == 0 and asked[2:] == ["dense"]
    with pytest.raises(SystemExit):
        main(["parallel", "--parts", "dense,deuce"])
    assert "no 'deuce'" in capsys.readouterr().err


def test_page() -> None:
    about = {"time": "2026-01-01T00:00:00Z", "seconds": 3.0, "compiler": "a" * 64, "others": 0.5, "quick": False}
    text = parallel_page.page({"experts": {"about": about, "records": [LAYER]}})
    assert text.count("Not measured yet.") == len(parallel_page.ABOUT) - 1
    assert "compiler aaaaaaaaaaaa; at least 9 rounds; other programs took 50% of the machine: times are rough." in text


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_part_runs(tmp_path: Path) -> None:
    assert main(["parallel", "--quick", "--results", str(tmp_path)]) == 0
    found = {part: json.loads((tmp_path / f"parallel_{part}.json").read_text())["records"] for part in parallel.PARTS}
    by_peer = {(one["rows"], one["peer"]): one for one in found["dense"]}
    for rows in parallel_layers.ROWS:  # the passes send in other pieces, not more
        assert by_peer[rows, "sequence_parallel"]["bytes"] == by_peer[rows, "sums"]["bytes"] == 2 * rows * 512 * 2
        assert by_peer[rows, "sequence_parallel"]["collectives"] == {"all_gather_rows": 2.0, "reduce_scatter_rows": 2.0}
    dropped = {(one["imbalance"], one["peer"]): one["dropped"] for one in found["drop"]}
    assert dropped[1.5, "capacity 1"] == pytest.approx(0.25) and dropped[1.5, "capacity 1.5"] == 0.0
    two = next(one for one in found["streams"] if one["peer"] == "two streams")
    assert len(two["timeline"]["busy"]) == 2 and two["timeline"]["together"] > 0
