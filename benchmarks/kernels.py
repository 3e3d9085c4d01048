"""`python -m benchmarks kernels`: what one decoder layer costs on the device, for every backend.

Two depths of the same model are captured; what the deeper one has more of, divided by the layers added, is a layer.
`vllm` is the decode graph that vLLM captures in FULL_DECODE_ONLY, attention and cache write included; the other
backends run transformers' code with a static cache, whose attention is written out in matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from benchmarks import apart, captured, devices, models

BACKENDS = ("ascend", "npugraph_ex", "npugraphs", "vllm")


def calls(graph: fx.Graph) -> int:
    """How many calls a graph makes."""
    return sum(node.op in ("call_function", "call_module", "call_method") for node in graph.nodes)


class Counting:
    """Counts the calls of the graphs a backend works on: `before` and `after` its own passes, None where unknown."""

    def __init__(self, backend: str) -> None:
        self.before: int | None = None
        self.after: int | None = None
        self.backend: Any = backend
        self.options: dict[str, Any] | None = None
        if backend == "npugraph_ex":  # its documented hooks, before and behind its own fusions
            self.options = {
                "post_grad_custom_pre_pass": self._count("before"),
                "post_grad_custom_post_pass": self._count("after"),
            }

    def _count(self, place: str) -> Callable[..., None]:
        def hook(module: fx.GraphModule, example_inputs: Any, config: Any) -> None:
            setattr(self, place, calls(module.graph))

        return hook

    def finish(self) -> None:
        """Reads what is known only after the compilation."""
        if self.backend == "ascend":
            from npu_compiler.backend import ascend

            newest = ascend.compiled()[-1]
            self.before, self.after = newest.records[0].nodes_before, newest.records[-1].nodes_after


def standalone(backend: str, name: str, layers: int) -> dict[str, Any]:
    """Compiles one step of `name` with `backend` and counts.

    Raises:
        AssertionError: the compiled step computes something else than the eager one.
    """
    device = devices.npu()
    known = {id(graph) for graph in captured.graphs()}
    torch._dynamo.reset()
    counting = Counting(backend)
    with torch.inference_mode():
        arguments = models.inputs(name, device)
        eager = models.step(name, layers, device)
        compiled = torch.compile(
            models.step(name, layers, device), backend=backend, fullgraph=True, dynamic=False, options=counting.options
        )
        for _ in range(3):
            wanted, found = eager(*arguments), compiled(*arguments)
        check_equal(found.cpu(), wanted.cpu(), f"{backend}, {name}, {layers} layers")
    counting.finish()
    made = captured.largest([graph for graph in captured.graphs() if id(graph) not in known])
    return {"kernels": made.kernels, "control": made.control, "before": counting.before, "after": counting.after}


def check_equal(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """In bfloat16 a model of many random layers drifts, so outputs are compared as directions, not element by element.

    Raises:
        AssertionError: their cosine is below 0.98.
    """
    left, right = found.double().flatten(1), wanted.double().flatten(1)
    cosine = float(torch.nn.functional.cosine_similarity(left, right).min())
    assert cosine > 0.98, f"{what}: differs from the eager model (cosine {cosine:.4f})"


def in_vllm(name: str, layers: int) -> dict[str, Any]:
    """Starts vLLM's engine on a model with made-up weights and counts in its decode graph."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    known = {id(graph) for graph in captured.graphs()}
    with tempfile.TemporaryDirectory() as folder:
        models.configuration(name, layers).save_pretrained(folder)
        llm = models.engine(folder, [models.BATCH])
    made = captured.largest([graph for graph in captured.graphs() if id(graph) not in known])
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return {"kernels": made.kernels, "control": made.control, "before": None, "after": None}


def measure(backend: str, name: str, depths: Sequence[int]) -> dict[str, Any]:
    """The counts of two depths in this process, and of one layer."""
    if backend == "vllm" and models.FAMILIES[name].encoder:
        return {"missing": "an encoder has no decode step; vLLM runs it without full graphs"}
    shallow, deep = (in_vllm(name, n) if backend == "vllm" else standalone(backend, name, n) for n in depths)
    added = depths[1] - depths[0]
    result: dict[str, Any] = {"missing": None, "depths": list(depths)}
    for key in ("before", "after"):
        result[f"nodes_{key}"] = None if shallow[key] is None else (deep[key] - shallow[key]) / added
    result["kernels"] = (len(deep["kernels"]) - len(shallow["kernels"])) / added
    result["model_kernels"] = [len(shallow["kernels"]), len(deep["kernels"])]
    result["layer"] = captured.one_layer(shallow["kernels"], deep["kernels"], added)
    return result


def measure_apart(backend: str, name: str, depths: Sequence[int]) -> dict[str, Any]:
    """`measure` in a process of its own: graphs and compilers of one backend do not meet those of another."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        command = ["-m", "benchmarks", "kernels", "--model", name, "--backends", backend]
        command += ["--depths", ",".join(map(str, depths)), "--measure", str(target)]
        return apart.measured(command, target, {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})


def text(backend: str, found: dict[str, Any]) -> str:
    """One backend's result as lines."""
    if found["missing"]:
        return f"{backend}: missing: {found['missing']}"
    nodes = ""
    if found["nodes_before"] is not None:
        nodes = f", {found['nodes_before']:g} -> {found['nodes_after']:g} FX calls"
    shallow, deep = found["model_kernels"]
    first = f"{backend}: {found['kernels']:g} kernels a layer{nodes}"
    first += f" ({shallow} and {deep} in {found['depths'][0]} and {found['depths'][1]} layers)"
    return "\n".join([first, *(f"    {line}" for line in found["layer"])])


def main(arguments: Sequence[str]) -> int:
    """0 when every chosen backend could be counted, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--model", default="qwen3", choices=list(models.FAMILIES))
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--depths", default="2,4", help="two numbers of layers (default: %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    backends = options.backends.split(",")
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        parser.error(f"no backend {sorted(unknown)[0]!r}; they are {', '.join(BACKENDS)}")
    depths = [int(depth) for depth in options.depths.split(",")]
    if options.measure:
        options.measure.write_text(json.dumps(measure(backends[0], options.model, depths)))
        return 0
    failed = False
    for backend in backends:
        found = measure_apart(backend, options.model, depths)
        failed = failed or bool(found["missing"])
        print(text(backend, found), flush=True)
    return int(failed)
