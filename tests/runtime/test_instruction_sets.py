"""The vector kernels are compiled once per instruction set, and machines differ: the narrower copies are tested too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch_npu  # noqa: F401 - loads the host runtime

from npu_compiler.runtime import instruction_set

SELECTION = (
    "test_rms_norm or test_swiglu or test_rope_from_a_cache or test_head_groups or (test_paged_attention and BSH)"
    " or test_layer_norm or test_add_rms_norm_dynamic_quant or test_swiglu_quant or test_head_groups_with_keys"
    " or test_queries_and_caches or test_caches_are_quantised or (test_products and (130 or 529))"
    " or (test_product_with_packed_weight and 40) or (test_larger_products_with_packed_weights and 424)"
    " or (test_int8_products_of_any_number_of_rows and 67) or (test_chunks_of_paged_prompts and BSH) or test_sums"
    " or (test_int8_weights and not any_size)"
)
# Products and attention have code for the dot products of bfloat16, which `avx512` goes without, and for AMX, which all
# go without.
CASES = [
    ("avx2", SELECTION),
    ("baseline", SELECTION),
    pytest.param(
        "avx512", "(test_products and (130 or 529)) or test_head_groups or test_int8_weights", marks=pytest.mark.full
    ),
    pytest.param(
        "avx512_dots",
        "(test_products and (130 or 529)) or test_product_with_packed_weight or test_head_groups or test_int8_weights",
        marks=pytest.mark.full,
    ),
]


def best() -> str:
    """What this machine can, by Linux's list of the processor's features."""
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.exists() else set()
    if not flags >= {"avx2", "fma", "bmi2"}:
        return "baseline"
    if not flags >= {f"avx512{part}" for part in ("f", "bw", "dq", "vl", "cd")}:
        return "avx2"
    if not flags >= {"avx512_bf16", "avx512_vnni"}:
        return "avx512"
    return "amx" if flags >= {"amx_tile", "amx_bf16", "amx_int8", "avx512vbmi"} else "avx512_dots"


@pytest.mark.parametrize(("narrower", "selection"), CASES)
def test_narrower_instruction_sets_agree_with_the_references(narrower: str, selection: str) -> None:
    names = [
        "norm_rope_operators",
        "attention_operators",
        "prefill_attention",
        "qkv_operators",
        "quant_operators",
        "int8_weights",
        "prepared_operators",
    ]
    files = [f"tests/runtime/test_{name}.py" for name in (*names, "operators_format")]
    files.append("tests/runtime/test_instruction_sets.py::test_no_more_than_asked_for_is_used")  # not this one again
    selection += " or test_no_more_than_asked_for_is_used"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection],
        env=os.environ | {"NPU_COMPILER_HOST_ISA": narrower},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-3000:]
    assert " passed" in child.stdout and "failed" not in child.stdout


def test_no_more_than_asked_for_is_used() -> None:
    order = ["baseline", "avx2", "avx512", "avx512_dots", "amx"]
    wish = os.environ.get("NPU_COMPILER_HOST_ISA", "amx")
    assert instruction_set.chosen() == min(wish, best(), key=order.index)
