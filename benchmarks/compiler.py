"""`python -m benchmarks compiler` (`make bench-compiler`): what the compiler does and costs, beside its peers.

For each model: kernels and FX calls of a layer; cold and warm compile seconds by stage; milliseconds and MiB of 35
captured sizes; vLLM's cold and warm start; what 35 decode graphs of vLLM add to their pool. Every measurement is a
fresh process; where times are taken, one after the other. Rows go to benchmarks/results/compiler_<model>.json with
their goals, part by part: what is stopped goes on by --resume. The page docs/compiler_figures.md is written from
them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import compiling, figures, kept, kernels, models
from benchmarks.apart import ROOT, measured
from npu_compiler.backend import fingerprint

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "compiler_figures.md"
PARTS = ("kernels", "compile", "sizes", "vllm", "pool")
TURNS = 3
AT_ONCE = 2
"""Processes at a time where only counts and bytes are taken, never times."""
WIDTHS, LARGEST = (1024, 2048), 2240
"""Hidden sizes, and the most requests, of the models whose decode graphs' memory is measured."""
COMPARED = ("ascend", "aot_eager")
"""Backends whose cold starts are measured so many times, one after the other in turn."""
KEEPING = ("ascend", "inductor")
"""Backends that keep something for the next process; to the others every start is a cold one."""
Record = dict[str, Any]


def apart(cache: str, kind: str, *arguments: object, module: str = "compiling") -> Record:
    """One measurement of benchmarks/compiling.py (or of `module`) in a fresh process, its compiler caches in `cache`.

    Returns:
        What it measured, or `missing` with the reason.
    """
    target = Path(cache) / "found.json"
    target.unlink(missing_ok=True)
    given = ", ".join(map(repr, arguments))
    code = f"import json; from benchmarks import {module}; found = {module}.{kind}({given}); "
    code += f"open({str(target)!r}, 'w').write(json.dumps(found))"
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "VLLM_CACHE_ROOT": cache,
        "XDG_CACHE_HOME": cache,
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    return {"missing": None, **measured(["-c", code], target, environment)}


def record(row: str, peer: str, unit: str, value: float | None, **more: Any) -> Record:
    """A row in the shape of the other benchmarks' rows, with what is special to it in `more`."""
    plain = {"row": row, "peer": peer, "unit": unit, "value": value, "floor": None, "goal": None, "met": None}
    return plain | {"missing": None} | more


def goal(value: float | None, text: str, met: bool) -> Record:
    return {"goal": text, "met": None if value is None else met}


def kernel_rows(name: str, depths: Sequence[int]) -> list[Record]:
    """Kernels a layer of each backend; ours has to be below npugraph_ex's, and Qwen3's decode graph at most 9."""
    with ThreadPoolExecutor(AT_ONCE) as processes:
        counts = processes.map(lambda backend: kernels.measure_apart(backend, name, depths), kernels.BACKENDS)
        found = dict(zip(kernels.BACKENDS, counts, strict=True))
    out = []
    for backend, one in found.items():
        value = one.get("kernels")
        more: Record = {key: one.get(key) for key in ("missing", "nodes_before", "nodes_after", "layer")}
        peer = found["npugraph_ex"].get("kernels")
        if backend == "ascend" and peer is not None:
            more |= goal(value, f"< {peer:g} (npugraph_ex)", value is not None and value < peer)
        if backend == "vllm" and name == "qwen3":
            more |= goal(value, "<= 9", value is not None and value <= 9) | {"floor": 7}
        out.append(record("kernels_per_layer", backend, "kernels", value, **more))
    return out


def compile_rows(name: str, depths: Sequence[int]) -> list[Record]:
    """Cold and warm seconds of each backend and depth; of ours and `aot_eager`, which the goal compares, the medians of
    cold starts made in turn."""
    out: list[Record] = []
    cold: dict[tuple[str, int], Record] = {}
    for layers in depths:
        starts: dict[str, list[Record]] = {backend: [] for backend in compiling.BACKENDS}
        for turn in range(TURNS):
            for backend in compiling.BACKENDS if turn == 0 else COMPARED:
                with tempfile.TemporaryDirectory() as cache:
                    starts[backend].append(apart(cache, "seconds", backend, name, layers))
                    again = turn == 0 and backend in KEEPING
                    warm = apart(cache, "seconds", backend, name, layers) if again else None
                if warm is not None:
                    out.append(_compile_row("warm", backend, layers, warm))
        for backend, found in starts.items():
            cold[backend, layers] = middle = _median(found)
            out.append(_compile_row("cold", backend, layers, middle, starts=[one.get("total") for one in found]))
        out += _ratio_rows(cold["ascend", layers], cold["aot_eager", layers], layers)
    after = [_after_lowering(cold["ascend", layers]) for layers in depths]
    if None not in after:
        ratio = after[1] / after[0]  # type: ignore[operator]
        met = goal(ratio, f"<= 2 ({depths[1]} layers against {depths[0]})", ratio <= 2)
        out.append(record("after_lowering_growth", "ascend", "x", ratio, **met))
    return out


def _compile_row(start: str, backend: str, layers: int, found: Record, **more: Any) -> Record:
    parts = {key: found.get(key) for key in ("missing", "cpu", "dynamo", "compiler", "passes", "order", "capture")}
    return record(f"compile_{start}", backend, "s", found.get("total"), layers=layers, **parts, **more)


def _ratio_rows(ours: Record, eager: Record, layers: int) -> list[Record]:
    """Our cold start over `aot_eager`'s: by wall time, which the goal is about, and by CPU time."""
    if ours["missing"] or eager["missing"]:
        return []
    wall, cpu = (ours[key] / eager[key] for key in ("total", "cpu"))
    met = goal(wall, "<= 1.3 x aot_eager", wall <= 1.3)
    return [
        record("compile_cold_ratio", "aot_eager", "x", wall, layers=layers, **met),
        record("compile_cold_cpu_ratio", "aot_eager", "x", cpu, layers=layers),
    ]


def _median(found: Sequence[Record]) -> Record:
    """Each figure's median over equal measurements; one that failed where all did."""
    good = [one for one in found if not one["missing"]]
    if not good:
        return found[0]
    keys = [key for key, value in good[0].items() if isinstance(value, (int, float))]
    return {**good[0], **{key: statistics.median(one[key] for one in good) for key in keys}}


def _after_lowering(found: Record) -> float | None:
    if found["missing"]:
        return None
    return float(found["passes"] + found["order"] + found["capture"])


def size_rows(name: str, layers: int) -> list[Record]:
    """Milliseconds and MiB of 35 sizes in one pool."""
    with tempfile.TemporaryDirectory() as cache:
        found = apart(cache, "sizes", name, layers)
    if found["missing"]:
        return [record("sizes", "ascend", "MiB", None, missing=found["missing"])]
    milliseconds, mebibytes = found["milliseconds"], found["mebibytes"]
    if len(mebibytes) != len(found["lengths"]):
        missing = f"{len(mebibytes)} captures of {len(found['lengths'])} sizes"
        return [record("sizes", "ascend", "MiB", None, missing=missing)]
    growth = sum(mebibytes) / mebibytes[0] if mebibytes[0] else None
    met = goal(growth, "<= 1.05", growth is not None and growth <= 1.05)
    return [
        record("capture_ms", "ascend", "ms", sum(milliseconds) / len(milliseconds), all=milliseconds),
        record("capture_mib", "ascend", "MiB", sum(mebibytes), all=mebibytes, captures=len(mebibytes)),
        record("pool_growth", "ascend", "x", growth, captures=len(mebibytes), **met),
    ]


def vllm_rows(name: str, depths: Sequence[int]) -> list[Record]:
    """Seconds of vLLM's start, cold and again, for each depth."""
    if models.FAMILIES[name].encoder:
        return []
    out = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (apart(cache, "vllm_start", name, layers) for _ in range(2))
        for start, one in (("cold", cold), ("warm", warm)):
            more = {key: one.get(key) for key in ("missing", "compile", "capture")}
            out.append(record(f"vllm_{start}", "vllm", "s", one.get("total"), layers=layers, **more))
        if not cold["missing"] and not warm["missing"] and cold["compile"]:
            ratio = warm["compile"] / cold["compile"]
            met = goal(ratio, "<= 0.33 of the cold compilation", ratio <= 1 / 3)
            out.append(record("vllm_warm_ratio", "vllm", "x", ratio, layers=layers, **met))
    return out


def pool_rows(name: str, widths: Sequence[int]) -> list[Record]:
    """How much 35 decode graphs of vLLM need over the largest alone, for several widths of a model."""
    if models.FAMILIES[name].encoder:
        return []

    def measured(hidden: int) -> Record:
        with tempfile.TemporaryDirectory() as cache:
            return apart(cache, "vllm_pool", name, hidden, LARGEST)

    with ThreadPoolExecutor(AT_ONCE) as processes:
        of_widths = list(processes.map(measured, widths))
    out = []
    for hidden, found in zip(widths, of_widths, strict=True):
        about: Record = {"hidden": hidden, "missing": found["missing"]}
        if found["missing"]:
            out.append(record("vllm_pool_growth", "vllm", "x", None, **about))
            continue
        mebibytes = found["mebibytes"]
        growth = sum(mebibytes) / mebibytes[0]
        met = goal(growth, "<= 1.05", growth <= 1.05)
        about |= {"all": mebibytes, "captures": len(mebibytes), "mib": sum(mebibytes), "mib_largest": mebibytes[0]}
        out.append(record("vllm_pool_growth", "vllm", "x", growth, **about, **met))
    return out


def line(entry: Record) -> str:
    """A row as printed."""
    label = f"  {entry['row']:22s} {entry['peer']:12s}"
    if "layers" in entry:
        label += f" {entry['layers']:3d} layers"
    if "hidden" in entry:
        label += f" {entry['hidden']:5d} wide"
    if entry["value"] is None:
        return f"{label} missing: {entry['missing']}"
    parts = [f"{label} {entry['value']:9.3f} {entry['unit']}"]
    if entry.get("nodes_before") is not None:
        parts.append(f"FX calls {entry['nodes_before']:g} -> {entry['nodes_after']:g}")
    parts += [
        f"{key} {entry[key]:.3f}"
        for key in ("cpu", "dynamo", "compiler", "passes", "order", "compile", "capture", "mib", "mib_largest")
        if entry.get(key) is not None
    ]
    if entry["goal"]:
        parts.append(f"goal {entry['goal']}: {'met' if entry['met'] else 'NOT met'}")
    return ", ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """0 when every measurement could be made (missed goals and missing peers are reported, not failures)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compiler", description=__doc__)
    parser.add_argument("--models", default=",".join(models.FAMILIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 and 4 layers instead of 4 and 28; writes no page")
    parser.add_argument("--resume", action="store_true", help="leave out parts that are there for this very compiler")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the rows there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen, names = options.parts.split(","), options.models.split(",")
    for given, valid in ((chosen, PARTS), (names, models.FAMILIES)):
        for one in given:
            if one not in valid:
                parser.error(f"no {one!r}; there are {', '.join(valid)}")
    for name in names if not options.page else ():
        _run(name, chosen, options)
    if not options.quick:
        found = {name: kept.read(options.results, name) for name in models.FAMILIES}
        PAGE.write_text(figures.page(found))
    return 0


def _run(name: str, chosen: Sequence[str], options: argparse.Namespace) -> None:
    """Measures parts of a model and keeps each as soon as it is there."""
    depths = (2, 4) if options.quick else models.DEPTHS
    parts = {
        "kernels": lambda: kernel_rows(name, depths),
        "compile": lambda: compile_rows(name, depths),
        "sizes": lambda: size_rows(name, depths[0]),
        "vllm": lambda: vllm_rows(name, depths),
        "pool": lambda: pool_rows(name, WIDTHS[:1] if options.quick else WIDTHS),
    }
    print(f"{name}: {depths[0]} and {depths[1]} layers, bfloat16", flush=True)
    compiler, there = fingerprint(), kept.read(options.results, name)
    for part in chosen:
        if options.resume and kept.is_current(there.get(part), compiler, depths):
            print(f"  {part}: there already", flush=True)
            continue
        found = kept.measured(parts[part], depths=list(depths), compiler=compiler)
        kept.write(options.results, name, part, found)
        for entry in found["records"]:
            print(line(entry), flush=True)
        loaded = ", others worked beside it" if kept.loaded(found) else ""
        print(f"  {part}: {found['about']['seconds']:.0f} s, {found['about']['cpu']:.0f} s of CPU{loaded}", flush=True)
