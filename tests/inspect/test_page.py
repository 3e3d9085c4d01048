"""The page's data and its file: what a pass changed, when tasks run, and that a bundle's text stays text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from npu_compiler.cli import main
from npu_compiler.errors import BundleError
from npu_compiler.inspect import bundle, page
from npu_compiler.inspect.contents import Captured, Stage, Step
from npu_compiler.inspect.page.changes import changes
from npu_compiler.inspect.page.timeline import timeline
from tests.inspect.made import call, layered, program, tensor, written

STATIC = Path(page.__file__).parent / "static"


def test_changes_are_those_of_a_graph() -> None:
    before = program(
        call("a", "x", storage=1),
        call("b", "x", storage=2),
        call("c", "a", "b", storage=3),
        call("d", "c", storage=4),
        call("e", "d", storage=5),
        call("f", "e", storage=6),
    )
    after = program(
        call("b", "x", storage=1),
        call("a", "x", storage=2),
        call("new", "a", "b", storage=3),
        call("d", "new", storage=4),
        call("e", "d", storage=5, target="aten.mul.Tensor", values=(tensor(5, 2, 2),)),
        call("f", "e", storage=5, writes=(5,)),
    )
    found = changes(before, after)
    assert found.removed == ("c",)
    assert found.added == ("new",)
    assert found.moved in (("a",), ("b",))
    assert {entry.name: entry.before for entry in found.changed} == {
        "d": {"inputs": "c"},
        "e": {"target": "aten.add.Tensor", "shape": "float32[4]"},
        "f": {"memory": "its own", "writes": "nothing"},
    }
    assert changes(before, before).changed == ()


def test_numbers_of_storages_alone_are_no_change() -> None:
    before = program(call("gone", "x", storage=1), call("a", "x", storage=2), call("view", "a", storage=2, micros=0))
    after = program(call("a", "x", storage=1), call("view", "a", storage=1, micros=0))
    found = changes(before, after)
    assert (found.removed, found.added, found.changed, found.moved) == (("gone",), (), (), ())


def test_a_view_of_a_call_that_was_replaced_lies_in_the_same_memory() -> None:
    before = program(call("old", "x", storage=1), call("view", "old", storage=1, micros=0))
    after = program(call("new", "x", storage=1), call("view", "new", storage=1, micros=0))
    assert [entry.before for entry in changes(before, after).changed] == [{"inputs": "old"}]


def test_slack_of_one_stream_is_what_dependencies_leave() -> None:
    found = timeline(
        program(
            call("long", "x", storage=1, micros=10.0),
            call("short", "x", storage=2, micros=3.0),
            call("view", "short", storage=2, micros=0),
            call("both", "long", "view", storage=3, micros=2.0),
        ),
        None,
    )
    assert [(launch.call, launch.start, launch.slack) for launch in found.launches] == [
        (1, 0.0, 0.0),
        (2, 10.0, 7.0),
        (4, 13.0, 0.0),
    ]
    assert (found.streams, found.microseconds, found.alone, found.chain) == (1, 15.0, 15.0, 12.0)


def test_a_write_waits_for_those_that_read() -> None:
    found = timeline(
        program(
            call("a", "x", storage=1, micros=1.0),
            call("reader", "a", storage=2, micros=5.0),
            call("writer", "a", storage=1, micros=1.0, writes=(1,)),
            call("end", "writer", storage=3, micros=1.0),
        ),
        None,
    )
    assert found.chain == 8.0
    assert all(launch.slack == 0 for launch in found.launches)


def test_slack_on_two_streams_counts_waits_and_events() -> None:
    shown = program(
        call("first", "x", storage=1, micros=2.0),
        call("main", "first", storage=2, micros=10.0),
        call("side", "first", storage=3, micros=4.0, target="aten.mm.default"),
        call("end", "main", "side", storage=4, micros=1.0),
    )
    steps = (
        Step(node="first", stream=0, record=1, end=2.0),
        Step(node="main", stream=0, end=13.0),
        Step(node="side", stream=1, waits=(1,), record=2, end=7.0),
        Step(node="end", stream=0, waits=(2,), end=14.0),
    )
    capture = Captured(key="s", reason="first shape", milliseconds=1.0, mebibytes=1.0, calls=4, steps=steps)
    found = timeline(shown, capture)
    assert [(launch.stream, launch.start, launch.waits) for launch in found.launches] == [
        (0, 0.0, ()),
        (0, 3.0, ()),
        (1, 3.0, (0,)),
        (0, 13.0, (2,)),
    ]
    assert [launch.slack for launch in found.launches] == [0.0, 0.0, 6.0, 0.0]
    assert (found.streams, found.microseconds, found.alone, found.chain) == (2, 14.0, 17.0, 13.0)


def parts(text: str) -> tuple[str, str, str, bytes]:
    """Policy, style, script and data of a page."""
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    return policy, style, script, gzip.decompress(base64.b64decode(data, validate=True))


def hashed(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_page_is_one_file_whose_policy_allows_itself_alone(tmp_path: Path) -> None:
    found = written(tmp_path, [(Stage(name="lowered"), layered(2, 8)), (Stage(name="final"), layered(2, 8))])
    text = page.render(found)
    policy, style, script, data = parts(text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'{hashed(script)}'"
    assert rules["style-src"] == f"'{hashed(style)}'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert json.loads(data) == json.loads(json.dumps(page.data_of(found)))
    assert page.render(found) == text
    assert not re.search(r"""(src|href)\s*=\s*["']|@import|url\(|sourceMappingURL""", text)
    assert len(text) < 200 << 10


def test_no_script_turns_text_into_markup() -> None:
    for name in page.SCRIPTS:
        source = (STATIC / name).read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\.src\b", source
        )
        assert "</script" not in source
        assert len(source.splitlines()) < 500


def test_a_text_can_not_leave_its_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{script}} ]]>\u2028"
    stage = Stage(name="final", error=evil)
    found = written(tmp_path, [(stage, layered(1, 2))], name="g", about={"options": {evil: evil}})
    text = page.render(found)
    assert text.count("<script") == 2 == text.count("</script>")
    assert "alert(1)" not in text
    data = json.loads(parts(text)[3])
    assert data["graphs"][0]["stages"][0]["error"] == evil


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(tmp_path / "dump", [(Stage(name="final"), layered(2, 4))])
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "dump"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'dump.html'}, ")
    assert (tmp_path / "dump.html").read_text() == page.render(bundle.open("dump"))
    assert main(["inspect", "dump", "--json", "--graph", "graph_0"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["stages"][0]["name"] == "final"
    assert main(["inspect", "dump", "-o", "no/such/folder.html"]) == 2
    assert "name another place with -o" in capsys.readouterr().err
    assert main(["inspect", "dump", "--graph", "other"]) == 2
    capsys.readouterr()
    (tmp_path / "dump" / "rank0" / "graph_0" / "00_stage.json").write_text('{"calls": 1}')
    with pytest.raises(BundleError, match="00_stage"):
        page.render(bundle.open(found.place))
