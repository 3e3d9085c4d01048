"""Peers on the plain CPU that run a program of their own: AOTInductor, ONNX Runtime and OpenVINO, each on as
many threads as torch has.

Each function takes a module of tensors and its arguments, and returns the step that runs it; a peer that can't run it
is `Missing` with its reason. In a decode step all of them get a graph that changes no input, which suits them best:
`in_place` writes what they return.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import devices
from benchmarks.harness import Missing

Arguments = tuple[Tensor, ...]
Run = Callable[[], Sequence[Tensor]]
Peer = Callable[[nn.Module, Arguments, torch.dtype], Run]
"""A peer gets its arguments once and keeps them: a call runs on what they hold then."""


def aot_inductor(model: nn.Module, arguments: Arguments, dtype: torch.dtype) -> Run:
    """The program that AOTInductor compiles, called past torch's Python wrapper, which parses the structure of its
    call each time."""
    del dtype  # that of the model
    with devices.needed("aot inductor"), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, arguments), package_path=str(Path(folder) / "model.pt2")
        )
        loader = torch._inductor.aoti_load_package(package).loader

    def run() -> Sequence[Tensor]:
        found: list[Tensor] = loader.run([*arguments])
        return found

    return run


def onnx_runtime(model: nn.Module, arguments: Arguments, dtype: torch.dtype) -> Run:
    """ONNX Runtime's session of the exported model, its inputs and outputs bound once."""
    runtime = installed("onnxruntime")
    if dtype != torch.float32:
        raise Missing(f"onnx runtime: its CPU provider has no matrix product in {str(dtype).removeprefix('torch.')}")
    errors = installed("onnxruntime.capi.onnxruntime_pybind11_state")
    own = (errors.Fail, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException)
    with devices.needed("onnx runtime", *own), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = exported(model, arguments, Path(folder))
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for described, argument in zip(session.get_inputs(), arguments, strict=True):
            array = argument.numpy()
            binding.bind_input(described.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        results = [torch.empty_like(result) for result in as_tuple(model(*arguments))]
        for described, result in zip(session.get_outputs(), results, strict=True):
            array = result.numpy()
            binding.bind_output(described.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run() -> Sequence[Tensor]:
        session.run_with_iobinding(binding)
        return results

    return run


def openvino(model: nn.Module, arguments: Arguments, dtype: torch.dtype) -> Run:
    """OpenVINO's compiled model; it may compute in `dtype`, the model and its arguments are float32."""
    library = installed("openvino")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    errors = installed("openvino.frontend")
    with devices.needed("openvino", errors.OpConversionFailure, errors.GeneralFailure), torch.no_grad():
        converted = library.convert_model(torch.export.export(model, arguments))
        settings = {"INFERENCE_PRECISION_HINT": hints[dtype], "PERFORMANCE_HINT": "LATENCY"}
        settings |= {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        compiled = library.Core().compile_model(converted, "CPU", settings)
        request = compiled.create_infer_request()
        for index, argument in enumerate(arguments):
            request.set_input_tensor(index, library.Tensor(argument.numpy(), shared_memory=True))
        results = [torch.empty_like(result) for result in as_tuple(model(*arguments))]
        for index, result in enumerate(results):
            request.set_output_tensor(index, library.Tensor(result.numpy(), shared_memory=True))

    def run() -> Sequence[Tensor]:
        request.infer()
        return results

    return run


def in_place(run: Run, caches: Tensor, position: int) -> Callable[..., Tensor]:
    """A decode step of a program that changes no input: its new keys and values go to `position` of `caches`.

    `caches` is (2, layers, batch, kv_heads, positions, head_dim). The step takes and ignores the arguments, which are
    bound.
    """
    keys, values = (cache[..., position, :] for cache in caches)

    def step(*_: Tensor) -> Tensor:
        logits, new_keys, new_values = run()
        keys.copy_(new_keys)
        values.copy_(new_values)
        return logits

    return step


def exported(model: nn.Module, arguments: Arguments, folder: Path) -> Path:
    """The model as an ONNX file in `folder`."""
    installed("onnxscript")
    file = folder / "model.onnx"
    with quiet():
        torch.onnx.export(model, arguments, str(file), dynamo=True, verbose=False)
    return file


def installed(name: str) -> Any:
    """The module `name`.

    Raises:
        Missing: it is not installed; `make bench` installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed; `make bench` installs it (pip install -e .[bench])") from error


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress and its notes on packages that it could also use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
