"""why-eager and why-recapture on compiled functions; the table of reasons; what the cache did, in bundles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler import reasons
from npu_compiler.backend import FROM_CACHE, STORED, AscendBackend, CompiledGraph, compile_fx, load_fx
from npu_compiler.cli import main
from npu_compiler.config import Options
from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle
from npu_compiler.inspect.bundle import StoredGraph
from npu_compiler.inspect.why_eager import why_eager
from npu_compiler.inspect.why_recapture import why_recapture


def test_every_reason_has_advice_and_is_found_by_its_text() -> None:
    defined = {entry.name for entry in vars(reasons).values() if isinstance(entry, reasons.Reason)}
    assert {entry.name for entry in reasons.ALL} == defined
    assert len(defined) == len(reasons.ALL)
    for entry in reasons.ALL:
        assert entry.change and entry.text
        assert reasons.of(entry.said()) == reasons.of(entry.said("4, 5")) == reasons.named(entry.name) == entry
    assert reasons.of("something else").change == ""


def accumulate(cache: Tensor, x: Tensor) -> Tensor:
    cache += x.sum(0)
    return x @ cache


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A function whose cache moved, whose sizes drive each other out, and that was compiled again for another dtype;
    the folder of its bundle, and the captures' reasons."""
    torch._dynamo.reset()
    other = torch.compile(torch.square, backend="eager", dynamic=False)  # its compilation 0/1 is not the one below
    other(torch.ones(2)), other(torch.ones(3))
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("dump")
    backend = AscendBackend()
    run = torch.compile(accumulate, backend=backend, dynamic=True, options={"dump": str(folder), "capture_limit": 1})
    first, second = torch.zeros(4).npu(), torch.zeros(4).npu()
    with torch.inference_mode():
        for cache, rows in ((first, 2), (first, 2), (second, 2), (second, 3), (second, 3), (second, 2)):
            run(cache, torch.ones(rows, 4).npu())
        run(first.half(), torch.ones(2, 4).half().npu())
    found = [[capture.reason for capture in entry.ledger.captures] for entry in backend.compiled() if entry.ledger]
    torch._dynamo.reset()  # the compiled functions go, and their calls are written
    return folder, found


def test_captures_beyond_the_first_are_grouped_with_what_changed(ran: tuple[Path, list[list[str]]]) -> None:
    folder, captured = ran
    assert [len(entry) for entry in captured] == [4, 1]
    found = {entry.reason: entry for entry in why_recapture(folder)}
    assert set(found) == {"moved", "driven_out", "recompiled"}
    assert len(found["moved"].keys) == 1 and "=2" in found["moved"].keys[0]
    assert found["moved"].changed[0].startswith("cache 0x") and " -> 0x" in found["moved"].changed[0]
    assert found["driven_out"].changed == ("capture_limit=1",)
    assert "dtype mismatch" in found["recompiled"].changed[0]
    assert all(entry.change and entry.milliseconds > 0 for entry in found.values())


def test_calls_that_were_no_replay_are_counted_to_the_last(ran: tuple[Path, list[list[str]]]) -> None:
    found = why_eager(ran[0])
    assert [(entry.kind, entry.reason, entry.count, entry.total) for entry in found] == [
        ("call", "first_call", 4, 6),
        ("call", "first_call", 1, 1),
    ]
    graph = bundle.open(ran[0]).graphs[0]
    assert graph.calls.replays == 2 and len(graph.calls.evicted) == 2


def test_equal_ranks_are_one_entry_and_others_are_named(tmp_path: Path) -> None:
    modes = {"total": 4, "replayed": 3, "piecewise": 0, "eager": 1}
    group = {"reason": "decode_too_large", "detail": "", "kind": "decode", "mode": "NONE", "steps": 1, "smallest": 26}
    group |= {"largest": 26, "sizes": [[26, 1]], "first": 2, "last": 2}
    rest = {"model": "m", "device": "d", "graphs": [], "not_captured": {}, "capture_milliseconds": 0.0}
    rest |= {"capture_mebibytes": 0.0, "padding_waste": 0.0, "generated_tokens": 4, "serving_seconds": 1.0}
    rest |= {"tokens_per_second": 4.0, "input_waits": 0, "decode_steps": modes, "other_steps": modes}
    about = {"versions": {}, "platform": "", "cann": "", "device": "", "ranks": 3}
    for rank, last in enumerate((2, 2, 3)):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        header = {"format": 1, "environment": {**about, "rank": rank}, "started": 0.0}
        (folder / "bundle.json").write_text(json.dumps(header))
        (folder / "run.json").write_text(json.dumps({**rest, "not_replayed": [{**group, "last": last}]}))
    both, other = why_eager(tmp_path)
    assert (both.ranks, other.ranks) == ((0, 1), (2,))
    lines = str(both).splitlines()
    assert lines[0].startswith("ranks 0, 1: 1 of 4 decode steps: ")
    assert lines[1:3] == ["  tokens: 26", "  steps:  2"]
    assert str(other).startswith("rank 2: ") and "  steps:  2 to 3" in str(other)
    assert not why_eager(tmp_path / "rank0")[0].ranks


def test_show_lists_what_vllm_captured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"versions": {}, "platform": "", "cann": "", "device": ""}
    (tmp_path / "bundle.json").write_text(json.dumps({"format": 1, "environment": about, "started": 0.0}))
    capture = {"mode": "FULL", "tokens": 4, "requests": 4, "milliseconds": 31.24, "mebibytes": 0.5}
    capture |= {"updated_operators": 2, "replays": 0, "reason": "first shape"}
    (tmp_path / "captures.jsonl").write_text(json.dumps(capture) + "\n")
    assert main(["show", str(tmp_path)]) == 0
    assert "  vLLM captured FULL 4 tokens: 31.2 ms, 0.5 MiB (first shape)" in capsys.readouterr().out.splitlines()


def test_the_commands_print_the_same(ran: tuple[Path, list[list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why-eager", str(ran[0])]) == 0
    assert "graph_0: 2 of 6 calls replayed" in (printed := capsys.readouterr().out)
    assert "4 of 6 calls: first call of a shape, before its capture\n  change: nothing: one call" in printed
    assert main(["why-recapture", str(ran[0])]) == 0
    assert "called again after its graph was driven out, once" in capsys.readouterr().out
    for command, function in (("why-eager", why_eager), ("why-recapture", why_recapture)):
        assert main([command, str(ran[0]), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data == [entry.model_dump(mode="json") for entry in function(ran[0])]


def test_a_report_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"model": "m"}')
    with pytest.raises(BundleError, match="is no run report"):
        why_eager(tmp_path / "run.json")
    assert main(["why-eager", str(tmp_path / "nowhere.json")]) == 2
    assert "there is no bundle at" in capsys.readouterr().err
    assert main(["why-recapture", str(tmp_path / "run.json")]) == 2
    assert "this command reads the bundle of the run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for command in ("why-eager", "why-recapture", "show"):
        assert main([command, str(tmp_path / "empty")]) == 2
        assert "holds no bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        (lambda x, y: x + y, {"capture": False}, "capture_off"),
        (lambda x, y: x + y, {"capture_sizes": [7]}, "size_not_listed"),
        (lambda x, y: x + y, {"capture_budget_seconds": 1e-9}, "over_budget"),
        (lambda x, y: x.cpu() + y.cpu(), {}, "nothing_on_device"),
    ],
)
def test_each_reason_of_the_code_is_known(
    function: Any, options: dict[str, Any], reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    torch._dynamo.reset()
    backend = AscendBackend()
    run = torch.compile(function, backend=backend, dynamic=True, options=options)
    for _ in range(2):
        run(torch.ones(3, 2).npu(), torch.ones(3, 2).npu())
    (compiled,) = backend.compiled()
    assert compiled.ledger is not None
    names = {reasons.of(text).name for text in compiled.ledger.uncaptured} - {"first_call"}
    assert names == {reason}


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NPU_COMPILER_CACHE", str(tmp_path / "cache"))
    yield tmp_path


def start(folder: Path, **options: Any) -> StoredGraph:
    """Compiles in a process that seems new, and reads the bundle."""
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: torch.relu(x) * 2, backend=AscendBackend(), options={"cache": True, "dump": str(folder), **options}
    )
    for _ in range(2):
        run(torch.ones(3).npu())
    return bundle.open(folder).graph()


def test_a_warm_start_has_a_bundle_and_a_miss_its_reason(cache_folder: Path) -> None:
    cold, warm, other = (
        start(cache_folder / name, **options) for name, options in (("a", {}), ("b", {}), ("c", {"freeze": True}))
    )
    assert cold.plan is not None and warm.plan is not None and other.plan is not None
    assert (cold.plan.cache, warm.plan.cache, other.plan.cache) == (STORED, FROM_CACHE, STORED)
    assert [stage.name for stage in warm.stages] == ["final"]
    assert warm.program(warm.stage("final")) == cold.program(cold.stage("final"))
    assert len(warm.captures) == len(cold.captures) == 1
    assert warm.plan.cache_key == cold.plan.cache_key and len(warm.plan.cache_key["graph"]) == 64
    assert cold.plan.cache_missed == ("nothing is stored yet",)
    assert other.plan.cache_missed == ("option freeze: False -> True",)
    assert warm.plan.memory == cold.plan.memory and warm.plan.providers == cold.plan.providers


def test_a_program_that_was_loaded_has_a_bundle(tmp_path: Path) -> None:
    """As vLLM's second start does it."""
    kept: list[bytes] = []

    def compiled(data: bytes | None) -> CompiledGraph:
        graph = torch.fx.symbolic_trace(lambda x: torch.relu(x) * 2)
        example = [torch.ones(3).npu()]
        options = Options(capture=False, dump=str(tmp_path / ("warm" if data else "cold")))
        if data is None:
            return compile_fx(graph, example, options, keep=kept.append)
        return load_fx(data, graph, example, options=options)

    compiled(None)
    result = compiled(kept[0])
    assert torch.equal(result(torch.ones(3).npu()).cpu(), torch.full((3,), 2.0))
    cold, warm = (bundle.open(tmp_path / name).graph() for name in ("cold", "warm"))
    assert warm.plan is not None and warm.plan.cache == FROM_CACHE and warm.plan.cache_key["sources"]
    # Without Dynamo's symbols the one has a size of its own making, the other the number.
    calls = [[(call.name, call.target) for call in one.program(one.stage("final")).calls] for one in (cold, warm)]
    assert calls[0] == calls[1] and ("relu", "aten.relu.default") in calls[0]
