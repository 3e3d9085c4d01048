"""The compiler's figures: kept part by part, and shown with their conditions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compiler, cpu, figures, kept
from benchmarks.compiler import record


def part(*records: kept.Record, others: float = 0.0, compiler: str = "abcdefgh") -> kept.Record:
    about: kept.Record = {"time": "2026-01-01T00:00:00Z", "seconds": 12.0, "cpu": 10.0, "others": others}
    return {"about": about | {"depths": [4, 28], "compiler": compiler}, "records": list(records)}


def test_a_part_takes_the_place_of_its_own_rows_only(tmp_path: Path) -> None:
    old, new, other = (part(record("row", "ascend", "s", value)) for value in (1.0, 2.0, 3.0))
    for name, one in (("vllm", old), ("pool", other), ("vllm", new)):
        kept.write(tmp_path, "qwen3", name, one)
    assert kept.read(tmp_path, "qwen3") == {"vllm": new, "pool": other}
    assert kept.read(tmp_path, "llama") == {}


def test_what_is_measured_again() -> None:
    assert kept.is_current(part(compiler="one"), "one", (4, 28))
    assert not kept.is_current(part(compiler="one"), "two", (4, 28))
    assert not kept.is_current(part(compiler="one"), "one", (2, 4))
    assert not kept.is_current(None, "one", (4, 28))


def test_resume_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def rows(kind: str) -> object:
        return lambda name, *_: measured.append(f"{name} {kind}") or [record(kind, "vllm", "x", 1.0)]

    for kind in ("vllm", "pool"):
        monkeypatch.setattr(compiler, f"{kind}_rows", rows(kind))
    arguments = ["--quick", "--resume", "--results", str(tmp_path), "--parts", "vllm,pool", "--models"]
    compiler.main([*arguments, "qwen3"])
    compiler.main([*arguments, "qwen3,llama"])
    assert measured == ["qwen3 vllm", "qwen3 pool", "llama vllm", "llama pool"]


def test_processes_at_once_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(cache: str, kind: str, name: str, hidden: int, largest: int) -> kept.Record:
        time.sleep(0.3 if hidden == 1 else 0.0)
        return {"missing": None, "mebibytes": [100.0 * hidden, 2.0]}

    def counts(backend: str, name: str, depths: tuple[int, int]) -> kept.Record:
        time.sleep(0.3 if backend == "ascend" else 0.0)
        return {"missing": None, "kernels": len(backend)}

    monkeypatch.setattr(compiler, "apart", pool)
    monkeypatch.setattr(compiler.kernels, "measure_apart", counts)
    assert [(row["hidden"], row["mib_largest"]) for row in compiler.pool_rows("qwen3", [1, 2])] == [(1, 100), (2, 200)]
    rows = compiler.kernel_rows("qwen3", (4, 28))
    assert [(row["peer"], row["value"]) for row in rows] == [(name, len(name)) for name in compiler.kernels.BACKENDS]


def test_work_of_other_programs_is_noticed() -> None:
    def work() -> list[kept.Record]:
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
        return []

    # Until it is waited for, a child is to this measure a program like any other.
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert kept.measured(work)["about"]["others"] > 0.25 / (os.cpu_count() or 1)
    finally:
        neighbour.kill()
        neighbour.wait()


def test_the_page_marks_missed_goals_and_loaded_parts() -> None:
    counts = {"ascend": 9.0, "npugraph_ex": 11.0, "npugraphs": 30.0, "vllm": 10.0}
    kernels = [
        record("kernels_per_layer", peer, "kernels", value, nodes_before=20.0, nodes_after=12.0)
        | ({"goal": "<= 9", "met": False} if peer == "vllm" else {})
        for peer, value in counts.items()
    ]
    pool = record("vllm_pool_growth", "vllm", "x", 1.04, hidden=1024, captures=35, mib=52.0, mib_largest=50.0, met=True)
    missing = record("vllm_pool_growth", "vllm", "x", None, hidden=2048, missing="no memory")
    page = figures.page({"qwen3": {"kernels": part(*kernels), "pool": part(pool, missing, others=0.5)}, "llama": {}})
    assert "| qwen3 | 9 | 11 | 30 | 20 -> 12 | 20 -> 12 | 10* |" in page
    assert "| qwen3 | 1024 | 35 | 50 | 52 | 1.040 |" in page
    assert "| qwen3 | 2048 | - | - | - | missing |" in page
    assert "| qwen3 | pool | 2026-01-01T00:00:00Z | 12 | 10 | 50%, loaded | `abcdef` |" in page
    assert "| qwen3 | kernels | 2026-01-01T00:00:00Z | 12 | 10 | 0% | `abcdef` |" in page


def started(cpu: float, wall: float, after: float | None = None) -> kept.Record:
    stages = None if after is None else {"lowering": 1.0, "passes": after - 0.1, "capture": 0.1}
    found = {"missing": None, "cpu": cpu, "wall": wall, "dynamo": 1.0, "compiler": 0.5}
    return found | {"after": after, "stages": stages}


def one_round(ours: float, eager: float, load: float) -> compiler.Round:
    """Starts of two backends at two depths, `load` times as long as on a machine that nobody else uses."""
    found: compiler.Round = {}
    for layers, times in ((4, 1.0), (28, 4.0)):
        cpu = ours * times * load
        found[f"cold ascend {layers}"] = started(cpu, 2 * cpu, 0.2 * times**0.5 * load)
        found[f"warm ascend {layers}"] = started(cpu / 2, cpu, 0.1)
        found[f"cold aot_eager {layers}"] = started(eager * times * load, 2 * eager * times * load)
    return found


def test_ratios_are_those_inside_a_round() -> None:
    """Each round ran under another load; medians over all starts would compare starts under different ones."""
    rounds = [one_round(1.2, 1.0, 1.0), one_round(1.2, 1.0, 3.0), one_round(1.8, 1.0, 2.0)]
    rows = {(row["row"], row["peer"], row.get("layers")): row for row in compiler.compile_rows(rounds, (4, 28))}
    ratio = rows["compile_cold_ratio", "aot_eager", 28]
    assert (ratio["value"], ratio["met"], ratio["rounds"]) == (pytest.approx(1.2), None, 3)
    assert (ratio["lowest"], ratio["highest"]) == (pytest.approx(1.2), pytest.approx(1.8))
    assert rows["compile_cold", "ascend", 4]["value"] == pytest.approx(3.6)
    assert rows["compile_cold", "ascend", 4]["stages"]["capture"] == 0.1


@pytest.mark.parametrize(
    ("ratios", "met"), [((1.1, 1.2, 1.0), True), ((1.4, 1.5, 1.6), False), ((1.1, 1.2, 1.4), None), ((1.1, 1.1), None)]
)
def test_a_goal_is_open_until_the_rounds_agree(ratios: tuple[float, ...], met: bool | None) -> None:
    rounds = [one_round(ratio, 1.0, 1.0) for ratio in ratios]
    rows = {(row["row"], row["peer"], row.get("layers")): row for row in compiler.compile_rows(rounds, (4, 28))}
    entry = rows["compile_cold_ratio", "aot_eager", 4]
    assert entry["met"] is met
    assert {True: "goal <= 1.3: met", False: "NOT met", None: "open"}[met] in compiler.line(entry)


def test_backends_take_turns() -> None:
    order = list(compiler.starts(3, (4, 28)))
    assert [backend for number, backend, layers in order if (number, layers) == (1, 4)] == [
        "aot_eager",
        "npugraph_ex",
        "npugraphs",
        "ascend",
    ]
    assert [number for number, backend, layers in order if (backend, layers) == ("inductor", 28)] == [0]
    assert len(order) == len(set(order)) == 2 * (3 * 4 + 1)


def test_starts_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def apart(cache: str, kind: str, backend: str, name: str, layers: int) -> kept.Record:
        made.append(f"{backend} {layers}")
        if len(made) == 5:
            raise KeyboardInterrupt
        return started(1.0, 2.0, 0.3 if backend == "ascend" else None)

    monkeypatch.setattr(compiler, "apart", apart)
    arguments = ["--quick", "--resume", "--results", str(tmp_path), "--parts", "compile", "--models", "qwen3"]
    with pytest.raises(KeyboardInterrupt):
        compiler.main(arguments)
    compiler.main(arguments)
    assert made[:5] == ["ascend 2", "ascend 2", "aot_eager 2", "npugraph_ex 2", "npugraphs 2"]
    assert made[5:7] == ["npugraphs 2", "ascend 4"]
    assert made[-4:] == ["inductor 2", "inductor 2", "inductor 4", "inductor 4"]
    assert len(made) == 15
    compiler.main(arguments)
    assert len(made) == 15


def test_the_page_of_compile_seconds() -> None:
    rounds = [one_round(1.5, 1.0, 1.0), one_round(1.35, 1.0, 1.0), one_round(1.4, 1.0, 1.0)]
    page = figures.page({"gemma": {"compile": part(*compiler.compile_rows(rounds, (4, 28)))}})
    ours, eager = "1.40 / 0.70, 2.8 s", "1.00, 2.0 s"
    assert f"| gemma | 4 | {ours} | {eager} | - | - | - | 1.40* | 1.35 .. 1.50, 3 rounds |" in page


def growth(monkeypatch: pytest.MonkeyPatch, load: Callable[[int], float], rounds: int = 3) -> list[compiler.Record]:
    """The rows of a model that takes 0.2 s at 4 layers and 0.3 s at 28, each start `load(its number)` times as long."""
    number = itertools.count()

    def apart(cache: str, kind: str, backend: str, name: str, layers: int) -> kept.Record:
        return started(9.0, 9.0, (0.2 if layers == 4 else 0.3) * load(next(number)))

    monkeypatch.setattr(compiler, "apart", apart)
    return compiler.growth_rows("gemma", (4, 28), rounds)


def test_the_shortest_start_of_a_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = growth(monkeypatch, lambda number: 3.0 if number % 6 in (0, 3, 4) else 1.0)
    few, many, ratio = rows
    assert (few["value"], many["value"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (ratio["lowest"], ratio["highest"]) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (ratio["rounds"], ratio["met"]) == (3, True)
    page = figures.page({"gemma": {"growth": part(*rows)}})
    assert "| gemma | 4 | 200 | 100 | 0 | 0 | 0 | 0 | 100 |  |  |" in page
    assert "| gemma | 28 | 300 | 200 | 0 | 0 | 0 | 0 | 100 | 1.50 | 1.50 .. 1.50, 3 rounds |" in page


def test_growth_is_open_while_rounds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = growth(monkeypatch, lambda number: 2.0 if number in (1, 3, 5) else 1.0)[-1]
    assert (ratio["highest"], ratio["met"]) == (pytest.approx(3.0), None)
    assert growth(monkeypatch, lambda number: 1.0, rounds=2)[-1]["met"] is None


def test_a_start_that_fails_leaves_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "apart", lambda *_: {"missing": "no memory"})
    (row,) = compiler.growth_rows("gemma", (4, 28), 3)
    assert (row["value"], row["missing"]) == (None, "no memory")
    assert "| gemma | 4 | missing |" in figures.page({"gemma": {"growth": part(row)}})


def test_children_count_and_an_idle_pool_does_not() -> None:
    def of_children() -> float:  # threads of earlier tests in this process work meanwhile
        return cpu.spent() - time.process_time()

    work = "import time\nwhile time.process_time() < 0.5: pass\n"
    before = of_children()
    subprocess.run([sys.executable, "-c", work], check=True)
    gone = of_children() - before
    waits = work + "print(flush=True)\nimport sys; sys.stdin.read()"
    found = []
    for arguments in ([], [cpu.POOL]):
        before = of_children()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", waits, *arguments], **pipes) as child:
            assert child.stdout is not None
            child.stdout.readline()
            found.append(of_children() - before)
            child.communicate()
    assert gone > 0.4 and found[0] > 0.4 and found[1] < 0.2


def test_the_clock_of_what_has_ended() -> None:
    with cpu.Clock() as clock:
        time.sleep(0.2)
        start, cpu_start = time.perf_counter(), time.process_time()
        sum(range(10_000_000))
        end, used = time.perf_counter(), time.process_time() - cpu_start
        time.sleep(0.1)
    assert clock.between(start, end) == pytest.approx(used, abs=0.05)
    assert clock.between(start - 0.15, start) < 0.05
