"""`bisect` finds ten planted defects by one command, without a hint; `minify` leaves a test of a few calls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_compiler import cli, fusion_kernels
from npu_compiler.errors import BundleError
from npu_compiler.graph import groups
from npu_compiler.inspect.bisect import UNCAPTURED, Cause
from npu_compiler.inspect.contents import Stage
from npu_compiler.inspect.from_graph import program_of
from npu_compiler.inspect.smallest import find, minify
from npu_compiler.inspect.worker import Source, Worker
from npu_compiler.passes import pipeline
from tests import world
from tests.inspect.made import written
from tests.inspect.planted import defects
from tests.inspect.planted.defects import DEFECTS, Defect, planted
from tests.one_rank import one_rank
from tests.passes.lowered import lowered

PLAIN = {
    "disabled_passes": [name for name in dict.fromkeys(pipeline.names()) if name != pipeline.USER_RULES],
    "layers_once": False,
    "reorder": False,
    "capture": False,
}
"""Nothing but what a test plants: fewer programs to run."""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def dumped(folder: Path, defect: Defect) -> Source:
    """The bundle of a compilation with the defect."""
    torch._dynamo.reset()
    communicates = "COLLECTIVE" in str(defect.options)
    with one_rank() if communicates else contextlib.nullcontext(), torch.no_grad():
        options = {"dump": str(folder), **defect.options}
        torch.compile(defect.program, backend="ascend", options=options)(*defect.arguments())
    return Source(bundle=str(folder))


def check(defect: Defect, cause: Cause) -> None:
    assert (cause.layer, cause.stage, cause.rule) == (defect.layer, defect.stage, defect.rule), str(cause)
    place = cause.match.place if cause.match is not None else cause.call.place if cause.call is not None else ""
    assert defect.line in place
    assert defect.shows in str(cause.outcome)
    assert cause.confirmed is defect.confirmed


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str, worker: Worker, tmp_path: Path) -> None:
    defect = DEFECTS[name]
    source = dumped(tmp_path / "dump", defect)
    cause = find(source, worker)
    check(defect, cause)
    small = minify(source, cause, worker, tmp_path / "test_small.py")
    assert cause.outcome.same(small.outcome), str(small)
    assert small.calls <= defect.calls < 20, Path(small.file).read_text()
    if name == "wrong fusion":
        text = Path(small.file).read_text()
        assert "planted.defects:FUSION" in text
        Path(small.file).write_text(text.replace("planted.defects:FUSION", "planted.defects:RIGHT_FUSION"))
        assert worker.run_file(Path(small.file)).right


def test_nothing_is_found_where_nothing_is_wrong(worker: Worker, tmp_path: Path) -> None:
    source = dumped(tmp_path, replaced(DEFECTS["wrong fusion"], "RIGHT_FUSION"))
    cause = find(source, worker)
    assert (cause.layer, cause.outcome.state) == ("nothing", "right"), str(cause)
    assert cause.probes == 3
    with pytest.raises(BundleError, match="there is nothing to make smaller"):
        minify(source, cause, worker, tmp_path / "test_none.py")


def replaced(defect: Defect, name: str, **options: Any) -> Defect:
    """A defect's program with another pass in the place of the wrong one."""
    return dataclasses.replace(defect, options=planted(name, **options))


def test_what_ends_the_process_is_found_too(worker: Worker, tmp_path: Path) -> None:
    """The compilation is dumped without the rule, which would end this process."""
    waves = dataclasses.replace(DEFECTS["wrong scale"], program=defects.waves, options={})
    source = dumped(tmp_path, waves).model_copy(update={"options": planted("CRASH", **PLAIN)})
    cause = find(source, worker)
    assert (cause.layer, cause.stage, cause.rule, cause.outcome.state) == ("pass", "planted", "ends", "crash"), str(
        cause
    )
    assert cause.outcome.kind == "SIGABRT"
    assert cause.confirmed


def test_a_call_that_can_not_be_captured_is_found(worker: Worker, tmp_path: Path) -> None:
    """The compilation is dumped without the rule, which would end it."""
    waves = dataclasses.replace(DEFECTS["wrong scale"], program=defects.waves, options={})
    source = dumped(tmp_path, waves).model_copy(update={"options": planted("READ_BACK")})
    cause = find(source, worker)
    assert (cause.layer, cause.rule, cause.outcome.state) == ("capture", "read_back", "error"), str(cause)
    assert cause.call is not None
    assert cause.call.operator == "planted.read_back.default"
    assert "x @ weight" in cause.call.place
    assert "can't" in cause.outcome.text or "failed" in cause.outcome.text


def test_a_pass_that_asks_for_ranks_runs_again_in_one_process(worker: Worker, tmp_path: Path) -> None:
    """The bundle is one of two ranks. A pass finds its rows in parts, which it needs the group's size for."""
    fusion_kernels.register()
    with world.group_of(2):
        graph = lowered(defects.normed_sums, *(torch.rand(*shape).npu() for shape in ((6, 8), (6, 8), (8,)))).graph
        program = program_of(graph.graph)
    assert program.groups == {world.DEFAULT: (0, 2)}
    options = {"sequence_parallel": 1, **planted("GATHER", **PLAIN)}
    options["disabled_passes"] = [name for name in PLAIN["disabled_passes"] if name != "sequence_parallel"]
    about = {"options": {name: repr(given) for name, given in options.items()}, "given": tuple(options)}
    written(tmp_path / "dump", [(Stage(name="lowered"), program)], about=about, environment={"ranks": 2})
    source = Source(bundle=str(tmp_path / "dump"))
    rewritten = worker.program_at(source, UNCAPTURED.model_copy(update={"passes": 1}))
    assert {call.target for call in rewritten.calls if "rows" in call.target} == {
        f"npu_fused.{name}_rows.default" for name in ("shard", "reduce_scatter", "all_gather")
    }
    cause = find(source, worker)
    assert (cause.layer, cause.stage, cause.rule) == ("pass", "planted", "doubled"), str(cause)
    small = minify(source, cause, worker, tmp_path / "test_small.py")
    assert cause.outcome.same(small.outcome), str(small)
    text = Path(small.file).read_text()
    assert "all_gather_rows" in text and "groups={'0': (0, 2)}" in text
    right = find(source.model_copy(update={"options": {**options, "passes": []}}), worker)
    assert right.layer == "nothing", str(right)


def test_no_collective_runs_in_a_made_up_group() -> None:
    with groups.made_up({"tp:0": (1, 4)}):
        assert (groups.rank_in("tp:0"), groups.ranks_of("tp:0")) == (1, 4)
        with pytest.raises(RuntimeError, match="ackend"):
            torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", "tp:0")
    assert groups.ranks_of("tp:0") == 0
    with one_rank(), groups.made_up({world.DEFAULT: (1, 4)}):
        assert groups.ranks_of(world.DEFAULT) == 1  # a group that is there stays


def test_rules_given_as_objects_have_to_be_named(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = {"dump": str(tmp_path), "rules": list(defects.FUSION.rules)}
    with torch.inference_mode():
        torch.compile(defects.gates, backend="ascend", options=options)(*DEFECTS["wrong fusion"].arguments())
    with pytest.raises(BundleError, match="which a bundle does not hold"):
        Source(bundle=str(tmp_path)).chosen()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bisect", "--minify", "FILE", "--option", "rules=nowhere:GATED"], "'nowhere:GATED' can't be imported"),
        (["replay", "--option", "rules=nowhere:GATED"], "'nowhere:GATED' can't be imported"),
        (["replay", "--disable", "swigl"], "disabled_rules names 'swigl', which does not exist"),
    ],
)
def test_a_rule_that_is_not_there_is_no_finding(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dumped(tmp_path, dataclasses.replace(DEFECTS["wrong fusion"], options=PLAIN))
    command, *more = arguments
    file = str(tmp_path / "test_small.py")
    assert cli.main([command, str(tmp_path), *(file if part == "FILE" else part for part in more)]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err.splitlines()[0] and err.count(said) == 1, err
    assert "lowered program" not in err and "nothing to make smaller" not in err


def test_what_another_version_did_is_found_in_the_stored_stages(worker: Worker, tmp_path: Path) -> None:
    """Compiled without the pass, everything is right; the programs in the bundle are wrong from it on."""
    source = dumped(tmp_path, DEFECTS["wrong scale"]).model_copy(update={"options": {}})
    cause = find(source, worker)
    assert (cause.layer, cause.stage, cause.outcome.state) == ("another version", "planted", "wrong"), str(cause)


def test_what_hangs_is_given_up(worker: Worker, tmp_path: Path) -> None:
    source = dumped(tmp_path / "dump", replaced(DEFECTS["wrong fusion"], "RIGHT_FUSION"))
    assert worker.run(source, UNCAPTURED).right
    (tmp_path / "hangs.py").write_text("import time\n\ndef outcome():\n    time.sleep(60)\n")
    worker.timeout, before = 0.5, worker.timeout
    assert worker.run_file(tmp_path / "hangs.py").state == "hang"
    worker.timeout = before


def test_the_command_says_it_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defect = DEFECTS["wrong scale"]
    dumped(tmp_path, dataclasses.replace(defect, options={**defect.options, **PLAIN}))
    file = tmp_path / "test_small.py"
    assert cli.main(["minify", str(tmp_path), "--json", "--to", str(file)]) == 1
    said = capsys.readouterr()
    cause, small = json.loads(said.out)
    assert Cause.model_validate(cause).rule == "one_scale"
    assert (small["calls"], small["outcome"]["state"], small["file"]) == (2, "wrong", str(file))
    assert "pass planted, 1 rewrites: right" in said.err
    assert cli.main(["replay", str(tmp_path), "--stop-after", "nowhere"]) == 2
    assert "is compiled by no pass 'nowhere'" in capsys.readouterr().err
