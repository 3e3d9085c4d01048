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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import compiling, figures, kept, kernels, models
from benchmarks.apart import ROOT, measured

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "compiler_figures.md"
PARTS = ("kernels", "compile", "growth", "sizes", "vllm", "pool")
ROUNDS = 3
"""Rounds of starts."""
REPEATS = 3
"""Starts of a depth in a round of `growth`. What other programs take from a start only makes it longer, so the shortest
counts."""
SLOW = ("inductor",)
"""Backends that are measured once: Inductor needs minutes."""
AT_ONCE = 2
"""Processes at a time where only counts and bytes are taken, never times."""
WIDTHS, LARGEST = (1024, 2048), 2240
"""Hidden sizes, and the most requests, of the models whose decode graphs' memory is measured."""
KEEPING = ("ascend", "inductor")
"""Backends that keep something for the next process; to the others every start is a cold one."""
Record = dict[str, Any]
Round = dict[str, Record]
"""What was measured, by the start, the backend and the layers."""


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
    plain = {"row": row, "peer": peer, "unit": unit, "value": value, "goal": None, "met": None}
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
            more |= goal(value, "<= 9", value is not None and value <= 9)
        out.append(record("kernels_per_layer", backend, "kernels", value, **more))
    return out


def starts(rounds: int, depths: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """The starts to measure, one after the other: number of the round, backend, layers. The order of the backends turns
    from round to round; SLOW ones come behind all rounds, and count for the first."""
    turning = [backend for backend in compiling.BACKENDS if backend not in SLOW]
    for number in range(rounds):
        turn = number % len(turning)
        for layers in depths:
            for backend in (*turning[turn:], *turning[:turn]):
                yield number, backend, layers
    for layers in depths:
        for backend in SLOW:
            yield 0, backend, layers


def start(backend: str, name: str, layers: int) -> Round:
    """A cold start and, of a backend that keeps something, a warm one."""
    with tempfile.TemporaryDirectory() as cache:
        return {
            f"{kind} {backend} {layers}": apart(cache, "seconds", backend, name, layers)
            for kind in (("cold", "warm") if backend in KEEPING else ("cold",))
        }


def compile_rows(rounds: Sequence[Round], depths: Sequence[int]) -> list[Record]:
    """CPU seconds of each backend and depth, cold and warm, medians over the rounds; ratios are medians of those inside
    a round."""
    out: list[Record] = []
    for layers in depths:
        for backend in compiling.BACKENDS:
            for start in ("cold", "warm"):
                found = _started(rounds, f"{start} {backend} {layers}")
                if found:
                    out.append(_compile_row(start, backend, layers, found))
        out += [_ratio_row(rounds, peer, layers) for peer in compiling.BACKENDS[1:]]
    return out


def _compile_row(start: str, backend: str, layers: int, found: Sequence[Record]) -> Record:
    good = [one for one in found if not one["missing"]]
    if not good:
        return record(f"compile_{start}", backend, "CPU s", None, layers=layers, missing=found[0]["missing"])
    parts = {key: _median(good, key) for key in ("wall", "dynamo", "compiler", "after")}
    every = {"starts": [round(one["cpu"], 2) for one in good], "stages": _stages(good) if good[0]["stages"] else None}
    return record(f"compile_{start}", backend, "CPU s", _median(good, "cpu"), layers=layers, **parts, **every)


def _ratio_row(rounds: Sequence[Round], peer: str, layers: int) -> Record:
    """Our cold start over a peer's, which for `aot_eager` has a goal."""
    both = _both(rounds, [f"cold {backend} {layers}" for backend in ("ascend", peer)])
    values = [_ratio(eager.get("cpu"), ours.get("cpu")) for ours, eager in both]
    wall = [_ratio(eager.get("wall"), ours.get("wall")) for ours, eager in both]
    most = 1.3 if peer == "aot_eager" else None
    return _median_row("compile_cold_ratio", peer, values, most, layers=layers, wall=_median_of(wall))


def _median_row(row: str, peer: str, found: Sequence[float | None], most: float | None, **more: Any) -> Record:
    """A ratio's median and range over the rounds. Whether the goal, `most`, is met is open with fewer than ROUNDS
    rounds, and where some are above it and some below: on a loaded machine one round says nothing."""
    good = [value for value in found if value is not None]
    middle = _median_of(good)
    more |= {"lowest": min(good, default=None), "highest": max(good, default=None), "rounds": len(good)}
    if most is not None:
        sides = {value <= most for value in good}
        settled = len(good) >= ROUNDS and len(sides) == 1
        more |= {"goal": f"<= {most:g}", "met": sides.pop() if settled else None}
    return record(row, peer, "x", middle, **more)


def _started(rounds: Sequence[Round], name: str) -> list[Record]:
    return [one[name] for one in rounds if name in one]


def _both(rounds: Sequence[Round], names: Sequence[str]) -> list[list[Record]]:
    """These starts of each round that has them all."""
    return [[one[name] for name in names] for one in rounds if all(name in one for name in names)]


def _ratio(below: float | None, above: float | None) -> float | None:
    return above / below if above and below else None


def _median(found: Sequence[Record], key: str) -> float | None:
    return _median_of([one[key] for one in found])


def _median_of(found: Sequence[float | None]) -> float | None:
    good = [value for value in found if value is not None]
    return statistics.median(good) if good else None


def growth_rows(name: str, depths: Sequence[int], rounds: int) -> list[Record]:
    """What comes after AOTAutograd in a cold start: CPU seconds at each depth, and the deeper model's over the other's.

    In a round the two depths take turns, and the shortest start of each counts.
    """
    shortest: dict[int, list[Record]] = {layers: [] for layers in depths}
    for _ in range(rounds):
        found: dict[int, list[Record]] = {layers: [] for layers in depths}
        for layers in [*depths] * REPEATS:
            with tempfile.TemporaryDirectory() as cache:
                found[layers].append(apart(cache, "seconds", "ascend", name, layers))
            if found[layers][-1]["missing"]:
                missing = found[layers][-1]["missing"]
                return [record("after_lowering", "ascend", "CPU s", None, layers=layers, missing=missing)]
        for layers, starts in found.items():
            shortest[layers].append(min(starts, key=lambda one: float(one["after"])))
    few, many = (shortest[layers] for layers in depths)
    ratios = [_ratio(one["after"], two["after"]) for one, two in zip(few, many, strict=True)]
    each = [
        record("after_lowering", "ascend", "CPU s", _median(found, "after"), layers=layers, stages=_stages(found))
        for layers, found in shortest.items()
    ]
    return [*each, _median_row("after_lowering_growth", "ascend", ratios, 2.0)]


def _stages(found: Sequence[Record]) -> dict[str, float]:
    """Medians of the stages' seconds."""
    return {stage: statistics.median(one["stages"].get(stage, 0.0) for one in found) for stage in found[0]["stages"]}


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
    """CPU seconds of vLLM's start, cold and again, for each depth."""
    if models.FAMILIES[name].encoder:
        return []
    out = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (apart(cache, "vllm_start", name, layers) for _ in range(2))
        for start, one in (("cold", cold), ("warm", warm)):
            more = {key: one.get(key) for key in ("missing", "wall", "compile", "compile_wall", "capture")}
            out.append(record(f"vllm_{start}", "vllm", "CPU s", one.get("cpu"), layers=layers, **more))
        if not cold["missing"] and not warm["missing"] and cold["compile"]:
            ratio, wall = (warm[key] / cold[key] for key in ("compile", "compile_wall"))
            met = goal(ratio, "<= 0.33 of the cold compilation", ratio <= 1 / 3)
            out.append(record("vllm_warm_ratio", "vllm", "x", ratio, layers=layers, wall=wall, **met))
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


MET = {True: "met", False: "NOT met", None: "open"}
SHOWN = ("wall", "dynamo", "compiler", "after", "lowest", "highest", "compile", "capture", "mib", "mib_largest")


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
    parts += [f"{key} {entry[key]:.3f}" for key in SHOWN if entry.get(key) is not None]
    parts += [f"{stage} {seconds:.3f}" for stage, seconds in (entry.get("stages") or {}).items()]
    if entry["goal"]:
        parts.append(f"goal {entry['goal']}: {MET[entry['met']]}")
    return ", ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """0 when every measurement could be made (missed goals and missing peers are reported, not failures)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compiler", description=__doc__)
    parser.add_argument("--models", default=",".join(models.FAMILIES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 and 4 layers instead of 4 and 28; writes no page")
    parser.add_argument("--resume", action="store_true", help="leave out parts that are there for this very compiler")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of starts (default: %(default)s)")
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
    from npu_compiler.backend import fingerprint  # brings up torch_npu, which --help needs not

    depths = (2, 4) if options.quick else models.DEPTHS
    parts = {
        "kernels": lambda: kernel_rows(name, depths),
        "growth": lambda: growth_rows(name, depths, options.rounds),
        "sizes": lambda: size_rows(name, depths[0]),
        "vllm": lambda: vllm_rows(name, depths),
        "pool": lambda: pool_rows(name, WIDTHS[:1] if options.quick else WIDTHS),
    }
    print(f"{name}: {depths[0]} and {depths[1]} layers, bfloat16", flush=True)
    about: Record = {"depths": list(depths), "compiler": fingerprint()}
    for part in chosen:
        there = kept.read(options.results, name).get(part) if options.resume else None
        there = there if kept.is_current(there, about["compiler"], depths) else None
        if part == "compile":
            _run_starts(name, there, about, options)
        elif there is not None:
            print(f"  {part}: there already", flush=True)
        else:
            found = kept.measured(parts[part], **about)
            kept.write(options.results, name, part, found)
            _print(part, found)


def _run_starts(name: str, there: Record | None, about: Record, options: argparse.Namespace) -> None:
    """Measures the starts that are missing, and keeps each as soon as it is there."""
    rounds: list[Round] = there["rounds"] if there is not None else []
    depths = about["depths"]
    for number, backend, layers in starts(1 if options.quick else options.rounds, depths):
        rounds += [{}] * (number == len(rounds))
        if f"cold {backend} {layers}" in rounds[number]:
            continue
        made = kept.measured(lambda of=(backend, layers): [start(of[0], name, of[1])], **about)  # type: ignore[misc]
        rounds[number] |= made["records"][0]
        conditions = made["about"] if there is None else kept.together(there["about"], made["about"])
        there = {"about": conditions, "records": compile_rows(rounds, depths), "rounds": rounds}
        kept.write(options.results, name, "compile", there)
        print(f"  round {number + 1}: {backend}, {layers} layers", flush=True)
    if there is not None:
        _print("compile", there)


def _print(part: str, found: Record) -> None:
    for entry in found["records"]:
        print(line(entry), flush=True)
    loaded = ", others worked beside it" if kept.loaded(found) else ""
    print(f"  {part}: {found['about']['seconds']:.0f} s, {found['about']['cpu']:.0f} s of CPU{loaded}", flush=True)
