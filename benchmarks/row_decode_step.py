"""A decode step (Qwen3-like, 4 layers, static cache): replayed, eager, and every peer on the plain CPU.

Every step of an `npu` contestant ends with a wait for the device: a server needs the token before the next step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import decode_model, devices, peers
from benchmarks.harness import Contestant, Factory, Goal, Row

Step = Callable[..., torch.Tensor]
FAMILIES = {torch.float32: ("float32", ""), torch.bfloat16: ("bfloat16", "_bf16")}
# Largest difference of two right results: bfloat16 keeps 8 bits, and the logits are sums over four layers of them.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
CACHED = 64 << 20
"""Bytes. Steps that read fewer find them in the last-level cache of servers, as the figures' machine has; hidden 1024
reads more."""
RIVALS = ("cpu eager", "cpu inductor", "aot inductor", "onnx runtime", "openvino")


@dataclasses.dataclass(frozen=True)
class Case:
    """A decode step of one size in one dtype."""

    size: decode_model.Size
    dtype: torch.dtype = torch.float32

    def model(self) -> decode_model.Decoder:
        return decode_model.decoder(self.size).to(self.dtype)


def contestant(name: str, step: Step, arguments: tuple[torch.Tensor, ...], wait: Callable[[], None]) -> Contestant:
    def batch(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                step(*arguments)
                wait()

    def output() -> torch.Tensor:
        with torch.inference_mode():
            return step(*arguments).cpu().clone()

    return Contestant(name, batch, output)


def on_cpu(name: str, case: Case, compiled: bool) -> Factory:
    def factory() -> Contestant:
        step: Step = case.model()
        arguments = decode_model.inputs(case.size)
        if compiled:
            with devices.needed(name), torch.inference_mode():
                step = torch.compile(step)
                step(*arguments)
        return contestant(name, step, arguments, devices.nothing)

    return factory


def read_only(name: str, case: Case, peer: peers.Peer, dtype: torch.dtype) -> Factory:
    """A program whose graph changes no input: the host writes new keys and values into the cache.

    `dtype` is that of the tensors it is given; they hold the row's weights, rounded to the row's dtype.
    """

    def factory() -> Contestant:
        model = case.model().to(dtype)
        arguments = decode_model.inputs(case.size)
        caches = decode_model.caches(model)
        run = peer(decode_model.ReadOnlyStep(model), (*arguments, *caches.flatten(0, 1)), case.dtype)
        step = peers.in_place(run, caches, int(arguments[1]))
        return contestant(name, step, arguments, devices.nothing)

    return factory


def on_npu(name: str, case: Case, backend: str | None, bound: bool = False, ahead: bool = False) -> Factory:
    """Eager on the device when `backend` is None, else torch.compile with that backend.

    `bound` and `ahead` are of "ascend". `bound`: as a server may have it that keeps its buffers and leaves its model
    alone. Inputs are read where they lie, the output stays in the graph's memory, and what the model holds is not
    compared at each call. `ahead`: compiled ahead of time, and called without guards, as the ahead-of-time rivals are.
    """

    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            model = case.model().to(device)
            arguments = tuple(argument.to(device) for argument in decode_model.inputs(case.size))
            step: Step = model if backend is None else compiled(model, arguments, backend, bound, ahead)
            for _ in range(3):  # compile, warm up and capture
                step(*arguments)
            torch.npu.synchronize()
        return contestant(name, step, arguments, devices.wait())

    return factory


def compiled(
    model: decode_model.Decoder, arguments: tuple[torch.Tensor, ...], backend: str, bound: bool, ahead: bool
) -> Step:
    """What calls the compiled model; `bound` and `ahead` as in `on_npu`."""
    options: dict[str, Any] = {}
    if bound:
        for argument in arguments:
            torch._dynamo.mark_static_address(argument)
        options["clone_outputs"] = False
        if not ahead:
            options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    # As it is called by default: `dynamic=False` and `fullgraph=True` have torch set its configuration at each call.
    step: Any = torch.compile(model, backend=backend, fullgraph=ahead, options=options or None)
    if not ahead:
        return step  # type: ignore[no-any-return]
    function = step.forward.aot_compile((arguments, {}))
    function.disable_guard_check()
    return functools.partial(function, model)


def bytes_roof(case: Case) -> float:
    """Microseconds to read the weights and the cache once at the bandwidth that one thread has here: of memory, or of
    the caches that so many bytes stay in from one step to the next."""
    with torch.device("meta"):
        model = decode_model.Decoder(case.size).to(case.dtype)
    read = decode_model.weight_bytes(model) + decode_model.cache_bytes(model)
    bandwidth = devices.read_bandwidth(read, passes=500) if read < CACHED else devices.read_bandwidth()
    return 1e6 * read / bandwidth


def row(label: str, case: Case, goals: tuple[Goal, ...], roof: bool = False) -> Row:
    family, suffix = FAMILIES[case.dtype]
    size = case.size
    return Row(
        name=f"decode_step_{label}{suffix}",
        title=f"decode step, {size.layers} layers, hidden {size.hidden}, batch {size.batch}, {family}",
        unit="us",
        contestants={
            "ascend": on_npu("ascend", case, "ascend"),
            "ascend bound": on_npu("ascend bound", case, "ascend", bound=True),
            "npu eager": on_npu("npu eager", case, None),
            "npugraphs": on_npu("npugraphs", case, "npugraphs"),
            "npugraph_ex": on_npu("npugraph_ex", case, "npugraph_ex"),
            "cpu eager": on_cpu("cpu eager", case, compiled=False),
            "cpu inductor": on_cpu("cpu inductor", case, compiled=True),
            "aot inductor": read_only("aot inductor", case, peers.aot_inductor, case.dtype),
            "onnx runtime": read_only("onnx runtime", case, peers.onnx_runtime, torch.float32),
            "openvino": read_only("openvino", case, peers.openvino, torch.float32),
        },
        reference="cpu eager",
        goals=goals,
        roof=(lambda: bytes_roof(case)) if roof else None,
        tolerance=TOLERANCE[case.dtype],
        rivals=RIVALS,
        kin=("ascend bound",),
    )


def ahead_row(case: Case, goal: float, threads: int = 1) -> Row:
    """Programs compiled ahead of time alone: each is called by itself, and compares nothing."""
    family, suffix = FAMILIES[case.dtype]
    hidden = case.size.hidden
    title = f"decode step, hidden {hidden}, {family}, compiled ahead of time and called without guards"
    return Row(
        name=f"decode_step_h{hidden}{suffix}_ahead" + "_two_threads" * (threads == 2),
        title=title + ", two compute threads" * (threads == 2),
        unit="us",
        contestants={
            "ascend ahead": on_npu("ascend ahead", case, "ascend", ahead=True),
            "ascend ahead bound": on_npu("ascend ahead bound", case, "ascend", bound=True, ahead=True),
            "cpu eager": on_cpu("cpu eager", case, compiled=False),
            "aot inductor": read_only("aot inductor", case, peers.aot_inductor, case.dtype),
            "onnx runtime": read_only("onnx runtime", case, peers.onnx_runtime, torch.float32),
            "openvino": read_only("openvino", case, peers.openvino, torch.float32),
        },
        reference="cpu eager",
        goals=(Goal(peer="ascend ahead", faster_than=goal),),
        roof=(lambda: bytes_roof(case)) if case.size == decode_model.HIDDEN_256 and threads == 1 else None,
        tolerance=TOLERANCE[case.dtype],
        rivals=RIVALS,
        kin=("ascend ahead bound",),
        threads=threads,
    )


def rows() -> list[Row]:
    beat = Goal(peer="ascend", faster_than=1.2)
    launches = (Goal(peer="npu eager", faster_than=10.0), Goal(peer="ascend", faster_than=1.0))
    smallest = Case(decode_model.HIDDEN_32)
    found = [row("h32", smallest, launches), ahead_row(smallest, 1.0), ahead_row(Case(decode_model.HIDDEN_256), 1.2)]
    for dtype in FAMILIES:
        for batch in (1, 8, 32):
            size = dataclasses.replace(decode_model.HIDDEN_256, batch=batch)
            goals = (Goal(peer="npu eager", faster_than=3.0), beat) if batch == 1 else (beat,)
            label = "h256" if batch == 1 else f"h256_b{batch}"
            found.append(row(label, Case(size, dtype), goals, roof=batch == 1))
    for dtype in FAMILIES:
        goals = (Goal(peer="ascend", roof_share=0.85),)
        found.append(row("h1024", Case(decode_model.HIDDEN_1024, dtype), goals, roof=True))
    found.append(ahead_row(Case(decode_model.HIDDEN_256), 1.0, threads=2))
    found += [ahead_row(Case(decode_model.HIDDEN_1024, dtype), 1.0, threads=2) for dtype in FAMILIES]
    return found
