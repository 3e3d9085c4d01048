"""The page in a real headless Chromium: opened, searched, stepped through, followed from line to task, in both themes.

They need playwright and a Chromium (tools/browser.py installs Debian's); in CI it must be there.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import models
from npu_compiler.backend import AscendBackend
from npu_compiler.inspect import bundle, page
from npu_compiler.inspect.bundle import Bundle
from npu_compiler.inspect.contents import Asked, Attempt, Block, Captured, Fire, Memory, Plan, Refusal, Stage, Step
from npu_compiler.inspect.page.changes import changes
from tests.inspect.made import Place, call, layered, program, written
from tools import browser as chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LAYERS = 28
INTERACTIVE = 33.0
"""Milliseconds of CPU for a frame: 30 frames a second."""
VIEWS = ("program", "graph", "pass", "source", "streams", "memory", "captures", "facts", "about")
NPU = torch.device("npu", 0)
FRAMES = """async () => {
    const rows = document.querySelector('.rows');
    const step = (rows.scrollHeight - rows.clientHeight) / 180;
    const times = [];
    let last = await new Promise(requestAnimationFrame);
    for (let frame = 0; frame <= 180; frame += 1) {
        rows.scrollTop = frame * step;
        const now = await new Promise(requestAnimationFrame);
        times.push(now - last);
        last = now;
    }
    return times;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        message = "no Chromium: `make browser` installs one, $NPU_COMPILER_BROWSER names one"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--force-color-profile=srgb"])
        yield started
        started.close()


class Opened:
    """A page with what it did: errors, messages, requests beyond its own file."""

    def __init__(self, browser: Browser, file: Path, width: int = 1500, height: int = 900) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": height})
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on(
            "request", lambda request: self.problems.extend([request.url] if not self._own(request.url) else [])
        )
        self.file = file
        self._meter = self.page.context.new_cdp_session(self.page)
        self._meter.send("Performance.enable", {"timeDomain": "threadTicks"})
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=20_000)

    def _own(self, url: str) -> bool:
        return url.split("#")[0] == self.file.as_uri()

    @property
    def ready(self) -> float:
        """Milliseconds from the start of the navigation to the list; the best of three, as the machine may be busy."""
        found = []
        for _ in range(3):
            found.append(self.page.evaluate("Number(document.documentElement.dataset.ready)"))
            if found[-1] < 3000:
                break
            self.page.reload()
            self.page.wait_for_selector("html[data-ready]", timeout=20_000)
        return min(found)

    def busy(self) -> float:
        """Milliseconds of CPU that the page's thread has taken so far."""
        metrics = self._meter.send("Performance.getMetrics")["metrics"]
        return 1e3 * next(entry["value"] for entry in metrics if entry["name"] == "TaskDuration")

    def scroll(self) -> str:
        """Goes through the whole list in 180 frames."""
        before = self.busy()
        times = self.page.evaluate(FRAMES)
        taken = (self.busy() - before) / len(times)
        assert taken < INTERACTIVE
        late = sum(time > 50 for time in times)
        return f"{taken:.1f} ms of CPU a frame, {late} of {len(times)} frames over 50 ms, longest {max(times):.0f} ms"

    def go(self, **state: Any) -> None:
        """Shows a state of the page, as a link to it does."""
        text = "&".join(f"{name}={value}" for name, value in state.items())
        self.page.evaluate("text => { location.hash = text; }", text)
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def settle(self) -> None:
        """Lets what a change asked for be drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def texts(self, selector: str) -> list[str]:
        return self.page.eval_on_selector_all(
            selector, "found => found.filter(e => e.checkVisibility()).map(e => e.textContent)"
        )

    def colors(self, selector: str) -> int:
        """How many colors a canvas shows."""
        return self.page.eval_on_selector(
            selector,
            """canvas => {
                const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
                return new Set(new Uint32Array(data.buffer)).size;
            }""",
        )


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A decode step of a Qwen3 of 28 layers, captured on two streams."""
    folder = tmp_path_factory.mktemp("decode")
    torch._dynamo.reset()
    options = {"dump": str(folder), "multistream": "auto"}
    with torch.inference_mode():
        run = torch.compile(models.step("qwen3", LAYERS, NPU), backend=AscendBackend(), dynamic=False, options=options)
        for _ in range(2):
            run(*models.inputs("qwen3", NPU))
    return bundle.open(folder)


@pytest.fixture(scope="module")
def decode_file(decode: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "decode.html"
    file.write_text(page.render(decode), encoding="utf-8")
    assert file.stat().st_size < 1 << 20
    return file


@pytest.fixture
def opened(browser: Browser, decode_file: Path) -> Iterator[Opened]:
    found = Opened(browser, decode_file)
    yield found
    assert found.problems == []
    found.page.close()


def test_28_layers_open_within_three_seconds_and_scroll(opened: Opened, decode: Bundle) -> None:
    ready = opened.ready
    assert 0 < ready < 3000
    final = decode.graph().program(decode.graph().stage("final"))
    shown = opened.page.evaluate("document.querySelector('.rows').scrollHeight")
    assert shown >= len(final.calls) * 22
    print(f"{LAYERS} layers: ready in {ready:.0f} ms; {opened.scroll()}")
    assert final.calls[-1].name in opened.texts(".row .name"), "the end of the list is there"


def test_search(opened: Opened) -> None:
    opened.press("2", "/")
    opened.page.keyboard.type("npu_fused layers.3.")
    opened.page.wait_for_selector(".chip")
    opened.press("Enter")
    rows = opened.texts(".row")
    assert len(rows) == opened.page.evaluate("document.querySelector('.spacer').clientHeight") / 22 > 2
    assert all("npu_fused" in row and ("layers.3" in row or "…" in row) for row in rows)
    opened.press("j", "j")
    assert opened.texts(".row.selected .name") == [opened.texts(".row .name")[1]]
    assert opened.texts("#detail h2")[0].startswith(opened.texts(".row.selected .name")[0])
    opened.press("Escape")
    assert not opened.texts(".chip")


def test_stepping_through_the_passes_shows_what_each_changed(opened: Opened, decode: Bundle) -> None:
    graph = decode.graph()
    stages = list(graph.stages)
    assert opened.texts(".stage.selected .name") == ["final"]
    seen = []
    for _ in range(len(stages)):
        opened.press("[")
        (name,) = opened.texts(".stage.selected .name")
        seen.append(name)
        if name == "lowered":
            break
    acting = [stage.name for stage in stages if stage.fired or stage.name in ("shortened", "lowered")]
    assert [name for name in reversed(seen) if name in acting] == acting
    number = next(i for i, stage in enumerate(stages) if stage.name == "add_rms_norm")
    found = changes(graph.program(stages[number - 1]), graph.program(stages[number]))
    opened.go(stage=number)
    assert opened.texts(".summary .stat") == [
        f"+{len(found.added)} added",
        f"−{len(found.removed)} removed",
        f"~{len(found.changed) + len(found.moved)} changed",
    ]
    opened.page.click(".summary .stat.added")
    assert set(opened.texts(".row.added .name")) == set(found.added)
    opened.page.click(".row.added")
    name = opened.texts(".row.selected .name")[0]
    assert "new here" in opened.texts("#detail h2")[0]
    fire = next(fire for fire in stages[number].fired if name in fire.made)
    opened.press("3")
    cards = opened.texts(".card")
    assert any(fire.rule in card and name in card and f"saves {fire.kernels} kernels" in card for card in cards)
    assert len(cards) >= len(stages[number].fired) + min(60, len(stages[number].refused))


def test_the_plan_of_streams_is_a_stage_behind_the_final_program(opened: Opened, decode: Bundle) -> None:
    graph = decode.graph()
    (capture,) = graph.captures
    assert opened.texts(".stage.selected .name") == ["final"]
    opened.press("]")
    assert opened.texts(".stage.selected .name") == [f"streams: {capture.key}"]
    assert not opened.texts(".stat.added") and not opened.texts(".stat.removed")
    aside = next(step for step in capture.steps if step.stream)
    opened.go(stage=len(graph.stages), call=aside.node)
    assert "side stream 1" in opened.texts(".row.selected .values")[0]
    assert any("ran on main stream" in text for text in opened.texts("#detail .was"))


def test_from_a_call_to_its_line_to_its_task_and_back(opened: Opened, decode: Bundle) -> None:
    graph = decode.graph()
    final = graph.program(graph.stage("final"))
    chosen = next(found for found in final.calls if found.target == "npu_fused.silu_mul.default")
    opened.go(stage=len(graph.stages) - 1, call=chosen.name)
    opened.press("s")
    line = opened.texts(".line.selected")[0]
    assert chosen.place.text in line and str(chosen.place.line) in line
    assert chosen.name in opened.texts(".hit .link")
    opened.page.click(f".hit .link >> text=/^{graph.captures[0].key}: task/ >> nth=0")
    opened.settle()
    assert opened.texts("#tabs [aria-selected=true]") == ["Streams"]
    task = opened.texts("#detail h2")[0]
    steps = [step.node for step in graph.captures[0].steps]
    assert task in steps
    assert any(f"task {steps.index(task)}, stream" in text for text in opened.texts("#detail section"))
    assert opened.colors(".streams canvas") > 4
    opened.press("l")
    assert opened.texts("#tabs [aria-selected=true]") == ["Program"]
    assert opened.texts(".row.selected .name") == [task]
    opened.page.click("#detail section:has(h3:text('Source')) .link")
    assert str(chosen.place.line) in opened.texts(".line.selected")[0]
    opened.page.go_back()
    opened.settle()
    assert opened.texts(".row.selected .name") == [task]


def test_replaced_calls_and_those_that_replace_them_lead_to_one_another(opened: Opened, decode: Bundle) -> None:
    graph = decode.graph()
    final = graph.program(graph.stage("final"))
    names = {found.name for found in final.calls}
    fused = next(found for found in final.calls if found.made_by == "add_rms_norm" and not names & {*found.replaces})
    opened.go(stage=len(graph.stages) - 1, call=fused.name)
    opened.page.click(f"#detail section:has(h3:text('Made by')) .link >> text=/^{fused.replaces[0]}$/")
    assert opened.texts(".stage.selected .name") == ["lowered"]
    assert opened.texts(".row.selected .name") == [fused.replaces[0]]
    opened.page.click("#detail section:has(h3:text('In the final program')) .link")
    assert opened.texts(".stage.selected .name") == ["final"]
    assert opened.texts(".row.selected .name") == [fused.name]


def test_modules_filter_the_program_and_walk_by_keys(opened: Opened) -> None:
    opened.press("m", "ArrowDown", "ArrowDown")
    path = opened.page.get_attribute("#modules .cursor", "title")
    opened.press("Enter")
    assert path is not None
    module = path.split(":")[0]
    assert opened.texts(".chip")[0].startswith(f"module {module}")
    titles = opened.page.eval_on_selector_all(".row:not([hidden]) .module", "found => found.map(e => e.title)")
    assert titles and all(title == module or title.startswith(f"{module}.") for title in titles)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_in_both_themes(opened: Opened, scheme: Any, tmp_path: Path) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = statistics.mean(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(","))
    assert (shade < 60) == (scheme == "dark")
    for number, view in enumerate(VIEWS, 1):
        opened.press(str(number))
        assert opened.texts("#tabs [aria-selected=true]")[0].lower() == view
        opened.page.screenshot(path=tmp_path / f"{view}-{scheme}.png")
        assert opened.page.evaluate("document.querySelector('.view').innerText.length") > 30
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for view in ("graph", "streams", "memory"):
        opened.go(view=view)
        assert opened.colors(".picture canvas") > 6, f"{view} in {scheme}"
    opened.press("t")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    opened.press("?")
    assert opened.page.is_visible("dialog[open]")
    opened.press("Escape")
    assert not opened.page.is_visible("dialog[open]")


@pytest.mark.parametrize("width", [1200, 2560])
def test_nothing_is_cut_off_at_other_widths(browser: Browser, decode_file: Path, width: int) -> None:
    found = Opened(browser, decode_file, width, 800)
    for view in VIEWS:
        found.go(view=view)
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    wide = found.page.evaluate("document.querySelector('main').clientWidth")
    assert wide > width / 2
    assert found.problems == []
    found.page.close()


def test_tens_of_thousands_of_calls(browser: Browser, tmp_path: Path) -> None:
    large = layered(200, 100)
    file = tmp_path / "large.html"
    started = time.perf_counter()
    file.write_text(page.render(written(tmp_path, [(Stage(name="final"), large)])), encoding="utf-8")
    rendered = time.perf_counter() - started
    found = Opened(browser, file)
    ready, frames = found.ready, found.scroll()
    assert "output" in found.texts(".row .name")
    found.press("2")
    before = found.busy()
    found.press("e")
    drawn = found.busy() - before
    assert found.colors(".graph canvas") > 4
    opened = f"{file.stat().st_size >> 10} KiB, ready in {ready:.0f} ms"
    print(f"20,000 calls: rendered in {rendered:.1f} s, {opened}; {frames}; all modules open: {drawn:.0f} ms of CPU")
    assert ready < 3000
    assert drawn < 2000
    assert found.problems == []
    found.page.close()


EVIL = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=2'>",
    '"><svg onload=window.hacked=3><style>*{display:none}</style>',
    "javascript:window.hacked=4//<!-- ${window.hacked=5} {{script}} \u2028\u202e",
)


def hostile(folder: Path) -> Bundle:
    """A bundle with markup and scripts wherever a text may stand."""
    text = " ".join(EVIL)
    place = Place(module=f"model.{EVIL[1]}.{EVIL[0]}", file=f"/{EVIL[2]}", line=3, function=EVIL[3], text=text)
    before = program(call("a", "x", storage=1, place=place), call("b", "a", storage=2, place=place))
    after = program(call("c", "x", storage=1, place=place, made_by=EVIL[1], replaces=("a", EVIL[0])))
    kinds = {
        "fired": (Fire(rule=EVIL[0], place=text, nodes=("a", EVIL[1]), made=("c",), kernels=1, bytes=EVIL[2]),),
        "refused": (Refusal(rule=EVIL[1], place=text, reason=text),),
        "attempts": (Attempt(rule=EVIL[2], anchor=EVIL[0], place=text, matched=1, reason=text, stopper=EVIL[1]),),
        "asked": (Asked(answer="unknown", text=text),),
    }
    block = Block(name=EVIL[1], first=1, last=2, offset=EVIL[0], end=EVIL[2], start=0, size=64)
    captured = Captured(
        key=EVIL[0],
        reason=text,
        milliseconds=1,
        mebibytes=1,
        calls=1,
        streams=EVIL[1],
        steps=(Step(node="c", stream=1, end=2.0),),
        uncaptured={EVIL[2]: 1},
        evicted=(EVIL[0],),
    )
    rule = {"name": EVIL[0], "roots": EVIL, "calls": 1, "file": EVIL[2]}
    environment = {"versions": {EVIL[0]: EVIL[1]}, "platform": text, "cann": text, "variables": {EVIL[1]: text}}
    return written(
        folder,
        [
            (Stage(name="lowered"), before),
            (Stage(name=EVIL[1], ran=True, **kinds), after),
            (Stage(name="final"), after),
        ],
        name="graph <b>bold<",
        plan=Plan(memory=Memory(peak=text, live=EVIL[0], blocks=(block,)), providers=(text,), cache=text),
        captures=[captured],
        about={
            "options": {EVIL[0]: EVIL[1]},
            "given": (EVIL[0],),
            "inputs": EVIL,
            "passes": ({"name": EVIL[1], "place": text, "rules": (rule,)},),
        },
        environment={**environment, "device": EVIL[0]},
    )


def test_a_hostile_bundle_is_shown_and_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(page.render(hostile(tmp_path / "</title><script>window.hacked=6<")), encoding="utf-8")
    found = Opened(browser, file)
    for stage in range(3):
        for view in VIEWS:
            found.go(stage=stage, view=view, call="a" if stage == 0 else "c")
            for x in range(20, 1500, 370):
                found.page.mouse.move(x, 300 + x / 5)  # what shows itself under the mouse
    shown = found.page.evaluate("document.body.innerText")
    assert "window.hacked" in shown
    found.go(stage=1, view="pass", call="c")
    assert EVIL[0] in found.page.inner_text(".card >> nth=0")
    assert found.page.evaluate("window.hacked") is None
    assert (
        found.page.evaluate("document.querySelectorAll('img, iframe, object, embed, svg, a, .view style').length") == 0
    )
    assert found.page.evaluate("document.querySelectorAll('script').length") <= 2
    assert found.problems == []
    refused = found.page.evaluate(
        """() => [
            () => { document.body.innerHTML = '<b>x</b>'; },
            () => { const made = document.createElement('script'); made.text = 'window.hacked = 7'; },
            () => { document.body.setAttribute('onclick', 'window.hacked = 8'); document.body.click(); },
        ].map((attempt) => { try { attempt(); return 'ran'; } catch (error) { return error.name; } })"""
    )
    assert refused[:2] == ["TypeError", "TypeError"], "the policy takes no text for markup or for a script"
    assert found.page.evaluate("window.hacked") is None
    found.page.close()


def test_what_is_missing_is_said(browser: Browser, tmp_path: Path) -> None:
    failed = [
        (Stage(name="lowered"), layered(1, 4)),
        (Stage(name="failed", error="behind noop: ValueError: no"), layered(1, 4)),
    ]
    file = tmp_path / "failed.html"
    file.write_text(page.render(written(tmp_path, failed)), encoding="utf-8")
    found = Opened(browser, file)
    for view, text in (
        ("pass", "ValueError: no"),
        ("streams", "ended before its last stage"),
        ("captures", "Nothing was captured"),
        ("memory", "ended before it had one"),
    ):
        found.go(view=view)
        assert text in found.page.inner_text(".view")
    assert found.problems == []
    found.page.close()
