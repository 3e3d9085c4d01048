"""A decode step of Qwen3-0.6B's layers with int8 weights, one scale a column of the result, against other formats.

The weights are the same numbers in every format: scales are powers of two, so that int8 times scale is a bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import decode_model, devices
from benchmarks.harness import Contestant, Factory, Goal, Row
from benchmarks.row_decode_step import TOLERANCE, contestant

DTYPE = torch.bfloat16
"""Of activations, scales and cache."""


class Int8Linear(nn.Module):
    """x [rows, inner] times an int8 weight [columns, inner] times `scale` [columns]: weight-only quantisation."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.to(DTYPE), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # what torchao's int8 weights are multiplied with on a CPU
            return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)
        return torch.ops.npu.npu_weight_quant_batchmatmul(x, self.weight.t(), self.scale)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [columns, inner], and powers of two [columns] by which it is the weight, rounded."""
    scale = torch.exp2(torch.ceil(torch.log2(weight.abs().amax(1) / 127)))
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


@torch.no_grad()
def model(size: decode_model.Size, int8: bool, dtype: torch.dtype = DTYPE) -> decode_model.Decoder:
    """The seeded decoder with weights that int8 can hold: as int8, or in `dtype`."""
    made = decode_model.decoder(size)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight, scale = quantised(child.weight)
                child.weight.copy_(weight * scale.unsqueeze(1))
                if int8:
                    setattr(parent, name, Int8Linear(weight, scale))
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return made


def on_npu(name: str, size: decode_model.Size, int8: bool, dtype: torch.dtype = DTYPE) -> Factory:
    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            arguments = tuple(argument.to(device) for argument in decode_model.inputs(size))
            step = torch.compile(model(size, int8, dtype).to(device), backend="ascend", fullgraph=True, dynamic=False)
            for _ in range(3):  # compile, warm up and capture
                step(*arguments)
            torch.npu.synchronize()
        return contestant(name, step, arguments, devices.wait())

    return factory


def on_cpu(name: str, size: decode_model.Size, compiled: bool) -> Factory:
    def factory() -> Contestant:
        step, arguments = model(size, int8=True), decode_model.inputs(size)
        if not compiled:
            return contestant(name, step, arguments, devices.nothing)
        with devices.needed(name), torch.inference_mode():
            run = torch.compile(step, fullgraph=True, dynamic=False)
            run(*arguments)
        return contestant(name, run, arguments, devices.nothing)

    return factory


def bytes_roof(size: decode_model.Size) -> float:
    """Microseconds to read the int8 weights, their scales and the cache once at the bandwidth of one thread here."""
    made = model(size, int8=True)
    return 1e6 * (decode_model.weight_bytes(made) + decode_model.cache_bytes(made)) / devices.read_bandwidth()


def rows() -> list[Row]:
    size = decode_model.HIDDEN_1024
    return [
        Row(
            name="decode_step_h1024_int8",
            title=f"decode step, {size.layers} layers, hidden {size.hidden}, batch {size.batch}, int8 weights",
            unit="us",
            contestants={
                "ascend": on_npu("ascend", size, int8=True),
                "ascend bfloat16": on_npu("ascend bfloat16", size, int8=False),
                "ascend float32": on_npu("ascend float32", size, int8=False, dtype=torch.float32),
                "cpu eager": on_cpu("cpu eager", size, compiled=False),
                "cpu inductor": on_cpu("cpu inductor", size, compiled=True),
            },
            reference="cpu eager",
            goals=(Goal(peer="ascend", roof_share=0.85), Goal(peer="ascend float32", faster_than=3.0)),
            roof=lambda: bytes_roof(size),
            tolerance=TOLERANCE[DTYPE],
            rivals=("cpu eager", "cpu inductor"),
            kin=("ascend bfloat16", "ascend float32"),
        )
    ]
