"""What can't be compiled or captured is refused with a place in the user's code and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from npu_compiler.config import Options
from npu_compiler.errors import CaptureError, DeviceError, NpuCompilerError, OptionError


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> NpuCompilerError:
    """The error that compiling and calling `function` ends with; torch.compile wraps what a backend raises."""
    with pytest.raises((BackendCompilerFailed, NpuCompilerError)) as caught:
        torch.compile(function, backend="ascend", **kwargs)(*args)
    error = caught.value
    inner = error if isinstance(error, NpuCompilerError) else error.inner_exception
    assert isinstance(inner, NpuCompilerError)
    assert str(inner) in str(error)
    return inner


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"captur": True}, "did you mean 'capture'?"),
        ({"disabled_passes": ["swigl"]}, "did you mean 'swiglu'?"),
        ({"capture_limit": "8"}, "capture_limit is int"),
        ({"capture_limit": 0}, "at least 1"),
        ({"capture_limit": True}, "capture_limit is int"),
        ({"capture_sizes": [4, 4]}, "named once"),
        ({"capture_sizes": ["4"]}, "a list of int"),
        ({"capture": False, "capture_limit": 4}, "capture=False contradicts capture_limit"),
        ({"capture": False, "capture_with": "npugraph_ex"}, "capture=False contradicts capture_with"),
        ({"capture_with": "npugraph_ex", "capture_limit": 4}, "capture_with='npugraph_ex' contradicts capture_limit"),
        ({"stream_limit": 4}, "stream_limit=4 limits nothing"),
        ({"dump_inputs": "call"}, "dump_inputs='call' keeps nothing"),
        ({"npugraph_ex": {"force_eager": True}}, "capture_with='ascend' contradicts npugraph_ex"),
        ({"capture_with": "npugraphs"}, "did you mean 'npugraph_ex'?"),
        ({"npugraph_ex": ["force_eager"]}, "npugraph_ex is a dict of npugraph_ex's options"),
        ({"capture_error_mode": "globl"}, "did you mean 'global'?"),
    ],
)
def test_options(options: dict[str, Any], part: str) -> None:
    error = refusal(lambda x: x + 1, torch.rand(2), options=options)
    assert isinstance(error, OptionError)
    assert part in str(error)


def test_mode() -> None:
    error = refusal(lambda x: x + 1, torch.rand(2), mode="reduce-overhead")
    assert "captured graphs are this backend's default" in error.fix


def test_host_tensor_among_device_tensors() -> None:
    error = refusal(lambda x, table: table[x.cpu()].npu(), torch.tensor([1], device="npu"), torch.rand(4, 2))
    assert isinstance(error, DeviceError)
    assert "table (4, 2)" in error.what


def test_copy_to_the_host_names_the_line() -> None:
    def moves(x: Tensor) -> Tensor:
        y = x + 1
        return y.cpu() * 2  # the line the error has to name

    error = refusal(moves, torch.rand(4).npu())
    assert isinstance(error, CaptureError)
    assert "return y.cpu() * 2" in error.where
    assert "capture" in error.fix


def test_data_dependent_shape_names_the_line() -> None:
    def picks(x: Tensor) -> Tensor:
        return x.nonzero() + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        error = refusal(picks, torch.tensor([0, 1]).npu(), fullgraph=True)
    assert "x.nonzero() + 1" in error.where
    assert "depends on tensor data" in error.what


def test_host_value_in_the_graph_names_the_line() -> None:
    def reads(x: Tensor) -> Tensor:
        n = x[0].item()
        return torch.zeros(n, device=x.device)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        error = refusal(reads, torch.tensor([3, 1]).npu(), fullgraph=True)
    assert "x[0].item()" in error.where
    assert "reads a tensor's value on the host" in error.what


def test_host_value_that_stays_a_tensor_is_captured() -> None:
    """`x * x.sum().item()`: AOTAutograd keeps the number on the device, so there is nothing to refuse."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = torch.compile(lambda x: x * x.sum().item(), backend="ascend", fullgraph=True)
        for scale in (1.0, 2.0, 3.0):
            assert run(torch.full((4,), scale).npu()).cpu().tolist() == [4 * scale * scale] * 4


def test_capture_off_lets_them_run() -> None:
    run = torch.compile(lambda x: x.cpu() * 2, backend="ascend", options={"capture": False})
    assert run(torch.ones(2).npu()).tolist() == [2.0, 2.0]


def test_operator_that_synchronises_inside_a_capture() -> None:
    """The operator looks harmless to the compiler; the capture itself is what refuses it."""
    with torch.library._scoped_library("refusals_test", "DEF") as library:
        library.define("syncs(Tensor x) -> Tensor")

        def syncs(x: Tensor) -> Tensor:
            torch.npu.current_stream().synchronize()
            return x + 1

        library.impl("syncs", syncs, "CompositeExplicitAutograd")
        library.impl("syncs", torch.empty_like, "Meta")

        def uses(x: Tensor) -> Tensor:
            return torch.ops.refusals_test.syncs(x) * 2

        x = torch.ones(4).npu()
        error = refusal(uses, x)
        assert isinstance(error, CaptureError)
        assert "torch.ops.refusals_test.syncs(x) * 2" in error.where
    # the device is usable, and the default stream current, after the refusal
    assert torch.npu.current_stream() == torch.npu.default_stream()
    run = torch.compile(lambda x: x + 3, backend="ascend")
    for _ in range(2):
        assert run(x).cpu().tolist() == [4.0] * 4


def test_options_are_values() -> None:
    assert Options.of({"capture_sizes": [1, 2]}) == Options(capture_sizes=(1, 2))
    assert Options.of(None) == Options()
