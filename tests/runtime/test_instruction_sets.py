"""The vector kernels are compiled once per instruction set, and machines differ: the narrower copies are tested too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SELECTION = (
    "test_rms_norm or test_swiglu or test_rope_from_a_cache or test_head_groups or (test_paged_attention and BSH)"
    " or test_layer_norm or test_add_rms_norm_dynamic_quant or test_swiglu_quant or test_head_groups_with_keys"
    " or test_queries_and_caches or test_caches_are_quantised"
)


@pytest.mark.parametrize("instruction_set", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree_with_the_references(instruction_set: str) -> None:
    files = [f"tests/runtime/test_{name}_operators.py" for name in ("norm_rope", "attention", "qkv", "quant")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", SELECTION],
        env=os.environ | {"NPU_COMPILER_HOST_ISA": instruction_set},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-3000:]
    assert " passed" in child.stdout and "failed" not in child.stdout
