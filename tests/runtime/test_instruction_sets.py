"""The vector kernels are compiled once per instruction set, and machines differ: the narrower copies are tested too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SELECTION = (
    "test_rms_norm or test_swiglu or test_rope_from_a_cache or test_head_groups or (test_paged_attention and BSH)"
    " or test_layer_norm or test_add_rms_norm_dynamic_quant or test_swiglu_quant or test_head_groups_with_keys"
    " or test_queries_and_caches or test_caches_are_quantised or (test_products and 130)"
)
# Only products have code for the dot products of bfloat16, which `avx512` goes without.
CASES = [
    ("avx2", SELECTION),
    ("baseline", SELECTION),
    pytest.param("avx512", "test_products and 130", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("instruction_set", "selection"), CASES)
def test_narrower_instruction_sets_agree_with_the_references(instruction_set: str, selection: str) -> None:
    files = [
        f"tests/runtime/test_{name}_operators.py" for name in ("norm_rope", "attention", "qkv", "quant", "prepared")
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection],
        env=os.environ | {"NPU_COMPILER_HOST_ISA": instruction_set},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-3000:]
    assert " passed" in child.stdout and "failed" not in child.stdout
