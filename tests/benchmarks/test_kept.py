"""The compiler's figures: kept part by part, and shown with their conditions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import compiler, figures, kept
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


def test_the_page_of_compile_seconds() -> None:
    def rows(start: str, layers: int, seconds: float) -> list[kept.Record]:
        return [record(f"compile_{start}", peer, "s", seconds, layers=layers) for peer in figures.BACKENDS]

    found = [*rows("cold", 4, 2.0), *rows("warm", 4, 1.0), *rows("cold", 28, 8.0), *rows("warm", 28, 3.0)]
    for layers, wall, cpu in ((4, 1.5, 1.2), (28, 1.1, 1.0)):
        found += [
            record("compile_cold_ratio", "aot_eager", "x", wall, layers=layers, met=wall <= 1.3),
            record("compile_cold_cpu_ratio", "aot_eager", "x", cpu, layers=layers),
        ]
    found.append(record("after_lowering_growth", "ascend", "x", 2.5, met=False))
    page = figures.page({"gemma": {"compile": part(*found)}})
    pair = "2.00 / 1.00"
    assert f"| gemma | 4 | {pair} | {pair} | {pair} | {pair} | 1.50* | 1.20 |  |" in page
    assert "| 1.10 | 1.00 | 2.50* |" in page
