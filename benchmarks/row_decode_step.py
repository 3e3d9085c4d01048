"""A decode step (Qwen3-like, 4 layers, batch 1, static cache): replayed, eager, and the plain CPU peers.

Every step of an `npu` contestant ends with a wait for the device: a server needs the token before the next step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import decode_model, devices
from benchmarks.harness import Contestant, Factory, Goal, Row

Step = Callable[..., torch.Tensor]


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


def on_cpu(name: str, size: decode_model.Size, compiled: bool) -> Factory:
    def factory() -> Contestant:
        step: Step = decode_model.decoder(size)
        arguments = decode_model.inputs(size)
        if compiled:
            with devices.needed(name), torch.inference_mode():
                step = torch.compile(step, fullgraph=True, dynamic=False)
                step(*arguments)
        return contestant(name, step, arguments, devices.nothing)

    return factory


def on_npu(name: str, size: decode_model.Size, backend: str | None) -> Factory:
    """Eager on the device when `backend` is None, else torch.compile with that backend."""

    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            step: Step = decode_model.decoder(size).to(device)
            tokens, position = (argument.to(device) for argument in decode_model.inputs(size))
            if backend is not None:
                step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
            for _ in range(3):  # compile, warm up and capture
                step(tokens, position)
            torch.npu.synchronize()
        return contestant(name, step, (tokens, position), devices.wait())

    return factory


def row(label: str, size: decode_model.Size, faster_than_eager: float) -> Row:
    return Row(
        name=f"decode_step_{label}",
        title=f"decode step, {size.layers} layers, hidden {size.hidden}, batch {size.batch}, float32",
        unit="us",
        contestants={
            "ascend": on_npu("ascend", size, "ascend"),
            "npu eager": on_npu("npu eager", size, None),
            "npugraphs": on_npu("npugraphs", size, "npugraphs"),
            "npugraph_ex": on_npu("npugraph_ex", size, "npugraph_ex"),
            "cpu eager": on_cpu("cpu eager", size, compiled=False),
            "cpu inductor": on_cpu("cpu inductor", size, compiled=True),
        },
        reference="cpu eager",
        goals=(Goal(peer="npu eager", faster_than=faster_than_eager),),
        tolerance=1e-4,
    )


def rows() -> list[Row]:
    return [row("h32", decode_model.HIDDEN_32, 10.0), row("h256", decode_model.HIDDEN_256, 3.0)]
