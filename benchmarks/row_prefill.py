"""The prefill of one prompt (Qwen3-like, 4 layers): products of many rows and causal attention, in bfloat16."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import decode_model, devices, peers
from benchmarks.harness import Contestant, Factory, Goal, Row
from benchmarks.row_decode_step import RIVALS, TOLERANCE, contestant

DTYPE = torch.bfloat16


def model(tokens: int, grouped: bool = True) -> decode_model.Prefill:
    size = dataclasses.replace(decode_model.HIDDEN_1024, positions=tokens)
    return decode_model.Prefill(decode_model.decoder(size).to(DTYPE), grouped).eval()


def inputs(tokens: int) -> torch.Tensor:
    """Embedded tokens (tokens, hidden)."""
    return torch.randn(tokens, decode_model.HIDDEN_1024.hidden, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def on_npu(name: str, tokens: int, backend: str | None) -> Factory:
    def factory() -> Contestant:
        device = devices.npu()
        with devices.needed(name), torch.inference_mode():
            step, x = model(tokens).to(device), inputs(tokens).to(device)
            if backend is not None:
                step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
            for _ in range(3):  # compile, warm up and capture
                step(x)
            torch.npu.synchronize()
        return contestant(name, step, (x,), devices.wait())

    return factory


def on_cpu(name: str, tokens: int, compiled: bool) -> Factory:
    def factory() -> Contestant:
        step, x = model(tokens), inputs(tokens)
        if compiled:
            with devices.needed(name), torch.inference_mode():
                step = torch.compile(step, fullgraph=True, dynamic=False)
                step(x)
        return contestant(name, step, (x,), devices.nothing)

    return factory


def exported(name: str, tokens: int, peer: peers.Peer, as_float: bool) -> Factory:
    def factory() -> Contestant:
        # ONNX Runtime and OpenVINO take float32 tensors (of the row's weights), and know no groups of heads.
        step, x = model(tokens, grouped=not as_float), inputs(tokens)
        if as_float:
            step, x = step.float(), x.float()
        run = peer(step, (x,), DTYPE)
        return contestant(name, lambda _: run()[0], (x,), devices.nothing)

    return factory


def row(tokens: int, long: bool) -> Row:
    return Row(
        name=f"prefill_{tokens}",
        title=f"prefill of {tokens} tokens, 4 layers, hidden {decode_model.HIDDEN_1024.hidden}, bfloat16",
        unit="ms",
        contestants={
            "ascend": on_npu("ascend", tokens, "ascend"),
            "npu eager": on_npu("npu eager", tokens, None),
            "cpu eager": on_cpu("cpu eager", tokens, compiled=False),
            "cpu inductor": on_cpu("cpu inductor", tokens, compiled=True),
            "aot inductor": exported("aot inductor", tokens, peers.aot_inductor, as_float=False),
            "onnx runtime": exported("onnx runtime", tokens, peers.onnx_runtime, as_float=True),
            "openvino": exported("openvino", tokens, peers.openvino, as_float=True),
        },
        reference="cpu eager",
        goals=(Goal(peer="ascend", faster_than=1.0),),
        tolerance=TOLERANCE[DTYPE],
        rivals=RIVALS,
        long=long,
    )


def rows() -> list[Row]:
    return [row(512, long=False), row(2048, long=True)]
