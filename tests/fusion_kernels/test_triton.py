"""The Triton kernels: their numerics in Triton's interpreter, that Triton's compiler takes them, and that nothing
depends on Triton being there, or being the one for this device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_compiler.backend import AscendBackend
from npu_compiler.fusion_kernels import triton_driver
from npu_compiler.fusion_kernels.swiglu import SILU_MUL
from tests.runtime.program import output_of

ROOT = Path(__file__).parents[2]
CHECKS = [
    "check_every_dtype",
    "check_rows_that_are_no_power_of_two",
    "check_no_rows",
    "check_a_row_of_zeros_is_quantized_to_zeros",
    "check_halves_are_rounded_to_even",
    "check_the_report_names_it",
    "check_every_activation_smoothed_and_shifted",
    "check_rows_longer_than_a_block_and_more_rows_than_programs",
]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install 'npu-compiler[test]'")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the checks found in a process of their own: Triton reads TRITON_INTERPRET when a kernel is defined."""
    file = tmp_path_factory.mktemp("triton") / "results.json"
    command = [sys.executable, "-m", "tests.fusion_kernels.triton_checks", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text()) if file.exists() else {}
    lost = f"the process ended with {ended.returncode} before this check:\n{ended.stderr[-4000:]}"
    return {check: found.get(check, lost) for check in CHECKS}


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(check: str, results: dict[str, str]) -> None:
    assert results[check] == "", results[check]


HALF, FLOAT, INT8 = "*bf16", "*fp32", "*i8"
SIZES = {"rows": "i32", "columns": "i32"}
NORM = {"x": HALF, "residual": HALF, "weight": FLOAT, "beta": FLOAT, **SIZES, "epsilon": "fp32"}
QUANT = {**NORM, "smooth": HALF, "values": INT8, "scales": FLOAT, "total": HALF}
GATE_QUANT = {"x": HALF, "smooth": HALF, "values": INT8, "scales": FLOAT, **SIZES}
# Kernel, types of its arguments, constants.
KERNELS = [
    ("norm_kernel", {**NORM, "normed": HALF, "total": HALF}, {"ADD": True, "SHIFT": 1.0, "BETA": True}),
    ("norm_kernel", {**NORM, "normed": HALF, "total": HALF}, {"ADD": False, "SHIFT": 0.0, "BETA": False}),
    ("norm_quant_kernel", QUANT, {"ADD": True, "SMOOTH": True, "BETA": True}),
    ("norm_quant_kernel", QUANT, {"ADD": False, "SMOOTH": False, "BETA": False}),
    (
        "gate_kernel",
        {"gate": HALF, "up": HALF, "result": HALF, **SIZES, "gate_stride": "i32", "up_stride": "i32"},
        {},
    ),
    ("gate_quant_kernel", GATE_QUANT, {"SMOOTH": True, "ACTIVATION": 0}),
    ("gate_quant_kernel", GATE_QUANT, {"SMOOTH": True, "ACTIVATION": 1}),
    ("gate_quant_kernel", GATE_QUANT, {"SMOOTH": False, "ACTIVATION": 2}),
]


@needs_triton
@pytest.mark.parametrize(("name", "types", "constants"), KERNELS, ids=[entry[0] for entry in KERNELS])
def test_triton_compiles_it_to_its_own_operations_alone(
    name: str, types: dict[str, str], constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes more than the compiler does; and what is inlined or external only one vendor's takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from npu_compiler.fusion_kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {**constants, "BLOCK": 1024}
    function = getattr(triton_kernels, name)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))  # whose front end is every Triton's
    operations = set(re.findall(r"^\s*(?:%\S+ = )?(\w+\.\w+) ", compiled.asm["ttir"], re.MULTILINE))
    assert {"tt.load", "tt.store", "scf.for"} <= operations
    assert {operation.split(".")[0] for operation in operations} <= {"tt", "arith", "math", "scf"}
    assert not {"tt.elementwise_inline_asm", "tt.extern_elementwise"} & operations


def program(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.silu(x @ x) * (x @ y)


def line_of_the_report() -> str:
    """What the report says of the program's gate, after a run on the device with the right result."""
    backend = AscendBackend()
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(program, backend=backend)(x.npu(), y.npu())
    torch.testing.assert_close(got.cpu(), program(x, y), rtol=1e-4, atol=1e-4)
    (compiled,) = backend.compiled()
    return next(line.strip() for line in str(compiled).splitlines() if "silu_mul x1" in line)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Which Triton there is, is found out once a process."""
    triton_driver._target.cache_clear()
    yield
    triton_driver._target.cache_clear()


def test_without_triton() -> None:
    """In a process of its own: torch, too, asks once whether Triton is there."""
    source = """
        import sys
        sys.modules["triton"] = None
        from tests.fusion_kernels.test_triton import line_of_the_report
        print(line_of_the_report())
    """
    line = output_of(source).splitlines()[-1]
    assert line.startswith("silu_mul x1: composition (not Triton: triton can't be imported: ")


@needs_triton
def test_with_a_triton_that_has_no_driver(asked_anew: None) -> None:
    assert line_of_the_report().startswith("silu_mul x1: composition (not Triton: triton has no driver: 0 active")


@needs_triton
@pytest.mark.parametrize(
    ("device", "name", "reason"),
    [("npu", "Triton", []), ("cuda", "composition", ["Triton: triton makes code for cuda, not for npu"])],
)
def test_the_driver_decides(
    device: str, name: str, reason: list[str], asked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that says what triton-ascend's says, and one of another Triton."""
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Driver(DriverBase):
        is_active = classmethod(lambda cls: True)  # type: ignore[assignment]
        map_python_to_cpp_type = get_current_target = get_benchmarker = lambda self, *args: None  # type: ignore[assignment]

        def get_active_torch_device(self) -> torch.device:
            return torch.device(device)

    monkeypatch.setattr(driver, "_active", Driver())
    x = torch.empty(4, 8, device="npu")
    assert (SILU_MUL.provider(x, x).name, SILU_MUL.passed_over(x, x)) == (name, reason)


def test_integers_are_refused() -> None:
    x = torch.ones(2, 4, dtype=torch.int32)
    (kernel,) = (provider for provider in SILU_MUL.providers if provider.name == "Triton")
    assert "torch.int32 is not one of" in kernel.refuses(x, x)
