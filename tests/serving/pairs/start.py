"""The process that starts engines: a line of its input is a start, a line of its output what came of it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.sweep.worker import ROW
from npu_compiler.backend import bundle_of
from npu_compiler.inspect import bundle
from npu_compiler.plan.weight_layout import FRACTAL_NZ
from npu_compiler.serving.dump import options_of
from tests.serving import engine, two_engines
from tests.serving.pairs import texts
from tests.serving.pairs.features import Rank
from tests.serving.pairs.plan import Start

Tokens = list[list[int]]
ENVIRONMENT = {
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # a program that is loaded has run no pass
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # note_facts goes to the ranks as a function
}
"""What a start needs."""


def row(start: Start) -> dict[str, Any]:
    """What came of a start: `outcome` is equal, different (tokens), idle (a feature did nothing) or failed."""
    begin = time.perf_counter()
    try:
        problem, reason = judged(start)
        found = {"outcome": problem, "reason": reason, "traceback": ""}
    except Exception as error:  # noqa: BLE001  any failure is a row
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        found = {"outcome": "failed", "reason": reason, "traceback": traceback.format_exc()}
    return {"start": str(start), **found, "seconds": round(time.perf_counter() - begin, 1)}


def judged(start: Start) -> tuple[str, str]:
    """Serves the start's model; the outcome, and what is wrong where it is not "equal"."""
    prompts, expected = texts.of(start.kind, start.dtype, start.layers, start.hidden)
    tokens, ranks = served(start, prompts, [len(answer) for answer in expected])
    for index, (got, right) in enumerate(zip(tokens, expected, strict=True)):
        if got != right:
            place = next(i for i, pair in enumerate(zip(got, right, strict=True)) if pair[0] != pair[1])
            return "different", f"prompt {index} of {len(prompts[index])} tokens: token {place} is another one"
    for feature in start.features:
        if not feature.shows(ranks):
            return "idle", f"nothing shows that {feature.name} was on: {[vars(rank) for rank in ranks]}"
    return "equal", ""


def served(start: Start, prompts: Tokens, counts: Sequence[int]) -> tuple[Tokens, list[Rank]]:
    """The tokens that an engine with the start's settings gives, and what its ranks say.

    All prompts at once, so that prompts are read in chunks beside decode steps, and batches of many sizes occur.
    """
    with (
        tempfile.TemporaryDirectory() as dump,
        tempfile.TemporaryDirectory() as facts,
        mock.patch.dict(os.environ, start.environment),
    ):
        settings = start.settings()
        if not settings.get("enforce_eager"):
            settings["compilation_config"] = {**settings.get("compilation_config", {}), "debug_dump_path": dump}
        run = replicated if "data_parallel_size" in settings else _one_engine
        tokens = run(texts.folder(start.kind, start.layers, start.hidden), settings, prompts, counts, facts)
        said = [json.loads(file.read_text()) for file in sorted(Path(facts).iterdir())]
        return tokens, [Rank(**_passes(fact.pop("bundle")), **fact) for fact in said]


def _one_engine(folder: Path, settings: dict[str, Any], prompts: Tokens, counts: Sequence[int], facts: str) -> Tokens:
    with engine.engine(folder, **settings) as llm:
        tokens = engine.generate(llm, prompts, list(counts))
        llm.collective_rpc(note_facts, args=(facts,))
        return tokens


def replicated(folder: Path, settings: dict[str, Any], prompts: Tokens, counts: Sequence[int], facts: str) -> Tokens:
    """Several engines behind one front, which is how vLLM does data parallelism."""
    tokens: Tokens = []

    async def asks(engines: two_engines.Engines) -> None:
        tokens.extend(await engines.answers(prompts, counts))
        await engines.call(note_facts, facts)

    two_engines.served(folder, asks, **settings)
    return tokens


def note_facts(worker: Any, folder: str) -> None:
    """Of a rank's process: writes what `Rank` asks for to a file of its own in `folder`."""
    import torch
    from vllm.distributed import get_pp_group, get_tp_group

    report, model = worker.report(), worker.model_runner.get_model()
    experts = [parameter.shape[0] for name, parameter in model.named_parameters() if name.endswith("w13_weight")]
    formats = [int(torch.ops.npu.get_npu_format(parameter)) for parameter in model.parameters()]
    written = bundle_of(options_of(worker.vllm_config))
    facts = {
        "bundle": str(written or ""),
        "decode": report["decode_steps"],
        "other": report["other_steps"],
        "experts": experts[0] if experts else 0,
        "fractal": formats.count(FRACTAL_NZ),
        "rows": [layer["rows"] for layer in report["experts"]],
        "moved": sum(layer["moved"] for layer in report["experts"]),
        "routed": sum(layer["routed"] for layer in report["dropped"]),
        "dropped": sum(layer["dropped"] for layer in report["dropped"]),
        "split": {entry["kind"]: entry["whole"] // entry["here"] for entry in report["split_weights"] if entry["here"]},
        "streams": max((graph["streams"] for graph in report["graphs"]), default=0),
        "tensor": get_tp_group().rank_in_group,
        "stage": get_pp_group().rank_in_group,
    }
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps(facts))


def _passes(folder: str) -> dict[str, dict[str, int]]:
    """How often each pass rewrote something in the programs of a rank (`fired`), and how often it left something
    (`left`): of those in its bundle, if it has one."""
    fired: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for graph in bundle.open(folder).graphs if folder else ():
        for stage in graph.stages:
            fired[stage.name] += len(stage.fired)
            left[stage.name] += len(stage.refused)
    return {"fired": dict(fired), "left": dict(left)}


def main() -> None:
    """Rows for the starts that standard input names, one a line."""
    os.environ.update(ENVIRONMENT)
    for line in sys.stdin:
        print(ROW + json.dumps(row(Start.parse(line.strip()))), flush=True)


if __name__ == "__main__":
    main()
