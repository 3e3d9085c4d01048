"""`python -m benchmarks dump`: what a bundle costs (docs/inspect.md): CPU seconds of a compilation with it over those
without, and MiB of the bundle, for decode steps of Qwen3's shape, standalone and in vLLM.

Every compilation is a fresh process, without any cache. Those with and without a bundle take turns; rows hold the
medians and all starts, and go to benchmarks/results/dump.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compiler, models
from benchmarks.compiler import Record, goal, record

GOAL = 2.0
"""A compilation with a bundle may take so many times the CPU seconds of one without."""
MODEL = "qwen3"


def standalone(layers: int, folder: str) -> dict[str, Any]:
    """CPU seconds of all threads from torch.compile to the end of the first call, its capture included; MiB of the
    bundle in `folder` (empty: none is asked for)."""
    import torch

    from benchmarks import devices

    device = devices.npu()
    with torch.inference_mode():
        arguments, step = models.inputs(MODEL, device), models.step(MODEL, layers, device)
        step(*arguments)  # operators and libraries are loaded before the clock starts
        start = time.process_time()
        options = {"dump": folder} if folder else {}
        torch.compile(step, backend="ascend", fullgraph=True, dynamic=False, options=options)(*arguments)
        torch.npu.synchronize()
        seconds = time.process_time() - start
    return {"seconds": seconds, "mebibytes": _mebibytes(folder)}


def vllm(layers: int, folder: str) -> dict[str, Any]:
    """CPU seconds of the compilations in an engine's start: from Dynamo to the backend, without captures."""
    import vllm  # noqa: F401  # before the clock starts
    from torch._dynamo.callback import on_compile_end, on_compile_start

    seconds = 0.0

    def started(_: object) -> None:
        nonlocal seconds
        seconds -= time.process_time()

    def ended(_: object) -> None:
        nonlocal seconds
        seconds += time.process_time()

    on_compile_start(started)
    on_compile_end(ended)
    model = str(Path(os.environ["VLLM_CACHE_ROOT"]) / "model")
    models.configuration(MODEL, layers).save_pretrained(model)
    models.engine(model, [1, 2, 4], additional_config={"compile": {"dump": folder}} if folder else {})
    return {"seconds": seconds, "mebibytes": _mebibytes(folder)}


def _mebibytes(folder: str) -> float:
    return sum(file.stat().st_size for file in Path(folder).rglob("*.*")) / 2**20 if folder else 0.0


def rows(kind: str, layers: int, turns: int) -> list[Record]:
    """Seconds without and with a bundle, their ratio, and the bundle's size."""
    found: dict[bool, list[Record]] = {False: [], True: []}
    for _ in range(turns):
        for dumps in found:
            with tempfile.TemporaryDirectory() as cache:
                folder = str(Path(cache) / "bundle") if dumps else ""
                one = compiler.apart(cache, kind, layers, folder, module="dumping")
            found[dumps].append(one)
            said = one["missing"] or f"{one['seconds']:.2f} s, bundle of {one['mebibytes']:.1f} MiB"
            print(f"  {kind}, {layers} layers, {'with' if dumps else 'without'} a bundle: {said}", flush=True)
    label = {"layers": layers}
    missing = next((one["missing"] for starts in found.values() for one in starts if one["missing"]), None)
    if missing:
        return [record("dump_ratio", kind, "x", None, **label) | {"missing": missing}]
    seconds = {dumps: [one["seconds"] for one in starts] for dumps, starts in found.items()}
    plain, dumped = (statistics.median(seconds[dumps]) for dumps in (False, True))
    ratio = dumped / plain
    size = statistics.median(one["mebibytes"] for one in found[True])
    return [
        record("compile_plain", kind, "s", plain, starts=seconds[False], **label),
        record("compile_dumped", kind, "s", dumped, starts=seconds[True], **label),
        record("dump_ratio", kind, "x", ratio, **label, **goal(ratio, f"<= {GOAL:g}", ratio <= GOAL)),
        record("bundle", kind, "MiB", size, **label),
    ]


def main(arguments: Sequence[str]) -> int:
    """0 when every measurement could be made (missed goals are reported, not failures), else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks dump", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="standalone,vllm", help="comma-separated (default: %(default)s)")
    parser.add_argument("--layers", default="4,28", help="comma-separated depths (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="compilations of each kind (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=compiler.RESULTS, help="folder of the JSON (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    for part in parts:
        if part not in ("standalone", "vllm"):
            parser.error(f"no part {part!r}; there are standalone, vllm")
    options.results.mkdir(parents=True, exist_ok=True)
    found: list[Record] = []
    for part in parts:
        for layers in map(int, options.layers.split(",")):
            for entry in rows(part, layers, options.turns):
                found.append(entry)
                print(compiler.line(entry), flush=True)
    about = {"model": MODEL, "turns": options.turns, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (options.results / "dump.json").write_text(json.dumps({"about": about, "records": found}, indent=1) + "\n")
    return 1 if any(entry["missing"] for entry in found) else 0
