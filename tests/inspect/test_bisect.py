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

from npu_compiler import cli
from npu_compiler.errors import BundleError
from npu_compiler.inspect.bisect import Cause
from npu_compiler.inspect.smallest import find, minify
from npu_compiler.inspect.worker import Source, Worker
from tests.inspect.planted import defects
from tests.inspect.planted.defects import DEFECTS, Defect, planted
from tests.one_rank import one_rank


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


def dumped(folder: Path, defect: Defect) -> Source:
    """The bundle of a compilation with the defect."""
    torch._dynamo.reset()
    communicates = "COLLECTIVE" in str(defect.options)
    with one_rank() if communicates else contextlib.nullcontext(), torch.inference_mode():
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
    assert small.outcome.same(cause.outcome), str(small)
    assert small.calls <= defect.calls < 20, Path(small.file).read_text()


def test_the_commands_go_from_a_wrong_output_to_a_test_that_passes_when_the_rule_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dumped(tmp_path / "dump", DEFECTS["wrong fusion"])
    file = tmp_path / "test_small.py"
    assert cli.main(["bisect", str(tmp_path / "dump"), "--json", "--minify", str(file)]) == 1
    cause, small = json.loads(capsys.readouterr().out)
    assert (cause["rule"], cause["confirmed"], small["outcome"]["state"]) == ("gated", True, "wrong")
    text = file.read_text()
    assert "planted.defects:FUSION" in text
    file.write_text(text.replace("planted.defects:FUSION", "planted.defects:RIGHT_FUSION"))
    with Worker() as worker:
        assert worker.run_file(file).right


def test_nothing_is_found_where_nothing_is_wrong(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    source = dumped(tmp_path, waves).model_copy(update={"options": planted("CRASH")})
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


def test_what_hangs_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\n\ndef outcome():\n    time.sleep(60)\n")
    with Worker(timeout=60) as worker:
        (tmp_path / "right.py").write_text(
            "from npu_compiler.inspect.replay import Outcome\n\ndef outcome():\n    return Outcome(state='right')\n"
        )
        assert worker.run_file(tmp_path / "right.py").right
        worker.timeout = 0.2
        assert worker.run_file(tmp_path / "hangs.py").state == "hang"


def test_rules_given_as_objects_have_to_be_named(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = {"dump": str(tmp_path), "rules": list(defects.FUSION.rules)}
    with torch.inference_mode():
        torch.compile(defects.gates, backend="ascend", options=options)(*DEFECTS["wrong fusion"].arguments())
    with pytest.raises(BundleError, match="which a bundle does not hold"):
        Source(bundle=str(tmp_path)).chosen()
