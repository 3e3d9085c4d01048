"""The Triton kernels in Triton's interpreter, on host tensors: `TRITON_INTERPRET=1 python -m
tests.fusion_kernels.triton_checks FILE`. FILE receives a JSON object from check to "" or to what went wrong."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from npu_compiler.backend import AscendBackend
from npu_compiler.fusion_kernels import OPERATORS, triton_kernels
from npu_compiler.fusion_kernels.operator import FusedOperator
from tests.fusion_kernels.test_operators import TOLERANCE, error, widened

WITH_KERNEL = [entry for entry in OPERATORS if any(provider.name == "Triton" for provider in entry.providers)]


def run(entry: FusedOperator, *args: Any) -> Any:
    """The result of an operator, which must come from its Triton kernel."""
    provider = entry.provider(*args)
    assert provider.name == "Triton", entry.passed_over(*args)
    return provider.run(*args)


def compare(entry: FusedOperator, args: Any, tolerance: float) -> None:
    """Values against the reference in float64; shapes, dtypes and strides against the fake."""
    got = run(entry, *args)
    assert error(got, entry.reference(*map(widened, args))) < tolerance
    for result, fake in zip(tree_leaves(got), tree_leaves(entry.fake(*args)), strict=True):
        assert (result.shape, result.dtype, result.stride()) == (fake.shape, fake.dtype, fake.stride())


def check_every_dtype() -> None:
    for entry in WITH_KERNEL:
        for dtype, tolerance in TOLERANCE.items():
            compare(entry, entry.example(dtype), tolerance)


def check_every_activation_smoothed_and_shifted() -> None:
    """What the examples leave out."""
    by_name = {entry.name: entry for entry in WITH_KERNEL}
    for dtype in TOLERANCE:
        x, smooth = torch.randn(3, 5, 128, dtype=dtype), torch.rand(64, dtype=dtype) + 0.5
        for approximate in ("none", "tanh"):
            compare(by_name["geglu_dynamic_quant"], (3 * x, approximate, smooth), TOLERANCE[dtype])
        x, beta, weight = x[..., :64], torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
        for given in ((None, None), (smooth, None), (None, beta), (smooth, beta)):
            compare(by_name["rms_norm_dynamic_quant"], (x, weight, *given, 1e-6), TOLERANCE[dtype])


def check_rows_longer_than_a_block_and_more_rows_than_programs() -> None:
    """64 columns in blocks of 32, 15 rows in 8 programs: as a row of 8192 in 75 rows would be."""
    triton_kernels.LARGEST_BLOCK, triton_kernels.PROGRAMS = 32, 8
    for entry in WITH_KERNEL:
        compare(entry, entry.example(torch.float32), TOLERANCE[torch.float32])


def check_rows_that_are_no_power_of_two() -> None:
    for entry in WITH_KERNEL:
        example = entry.example(torch.float32)
        last = example[0].shape[-1]
        args = tree_map(lambda leaf: narrowed(leaf, last), tuple(example))  # noqa: B023  called here
        compare(entry, args, TOLERANCE[torch.float32])


def narrowed(leaf: Any, last: int) -> Any:
    """A tensor without two of its `last` columns, not contiguous where it has rows; without one of the half of them."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf[..., : -2 if leaf.shape[-1] == last else -1]


def check_no_rows() -> None:
    for entry in WITH_KERNEL:
        args = [arg[:0] if isinstance(arg, Tensor) and arg.dim() == 3 else arg for arg in entry.example(torch.float32)]
        assert all(leaf.numel() == 0 for leaf in tree_leaves(run(entry, *args)))


def check_a_row_of_zeros_is_quantized_to_zeros() -> None:
    for entry in WITH_KERNEL:
        if "quant" in entry.name:
            args = [torch.zeros_like(a) if isinstance(a, Tensor) else a for a in entry.example(torch.float32)]
            assert all(not leaf.any() for leaf in tree_leaves(run(entry, *args)))


def check_halves_are_rounded_to_even() -> None:
    """The largest value is 127, so the step is 1 and every other value a half: silu(32) is 32 in float32."""
    up = torch.arange(-63.5, 64.0, 1.0)
    up[0] = 127.0
    (entry,) = (entry for entry in WITH_KERNEL if entry.name == "swiglu_dynamic_quant")
    values, scale = run(entry, torch.cat([torch.full_like(up, 32.0), up / 32.0])[None], None)
    assert scale.item() == 1.0
    assert torch.equal(values[0].float(), up.round())


def check_the_report_names_it() -> None:
    def program(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ x) * (x @ y)

    backend = AscendBackend()
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    with torch.no_grad():
        got = torch.compile(program, backend=backend, options={"capture": False})(x, y)
        torch.testing.assert_close(got, program(x, y))
    (compiled,) = backend.compiled()
    assert "\n  silu_mul x1: Triton\n" in str(compiled), str(compiled)


CHECKS: tuple[Callable[[], None], ...] = (
    check_every_dtype,
    check_rows_that_are_no_power_of_two,
    check_no_rows,
    check_a_row_of_zeros_is_quantized_to_zeros,
    check_halves_are_rounded_to_even,
    check_the_report_names_it,
    check_every_activation_smoothed_and_shifted,
    check_rows_longer_than_a_block_and_more_rows_than_programs,  # last: it makes the blocks small
)


def main(file: str) -> None:
    torch.manual_seed(0)
    results: dict[str, str] = {}
    for check in CHECKS:
        results[check.__name__] = ""
        try:
            check()
        except Exception:  # noqa: BLE001  the report of a check is whatever went wrong
            results[check.__name__] = traceback.format_exc()
        Path(file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
