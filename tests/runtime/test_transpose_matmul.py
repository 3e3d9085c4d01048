"""Products whose batches come second: what npu_transpose_batchmatmul fuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

from tests.runtime import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40], ids=["decode", "few", "many"])
@pytest.mark.parametrize(
    ("perm_x1", "perm_x2", "split"),
    [([0, 1, 2], [0, 1, 2], 1), ([1, 0, 2], [0, 1, 2], 1), ([1, 0, 2], [0, 2, 1], 1), ([1, 0, 2], [0, 1, 2], 2)],
)
def test_products(perm_x1: list[int], perm_x2: list[int], split: int, rows: int, dtype: torch.dtype) -> None:
    batches, inner, columns = 4, 24, 16
    x1, x2 = torch.randn(batches, rows, inner).to(dtype), torch.randn(batches, inner, columns).to(dtype)
    expected = (x1.double() @ x2.double()).transpose(0, 1)
    if split > 1:
        expected = expected.reshape(rows, split, -1).transpose(0, 1)
    actual = torch_npu.npu_transpose_batchmatmul(
        x1.permute(perm_x1).contiguous().npu(),
        x2.permute(perm_x2).contiguous().npu(),
        perm_x1=perm_x1,
        perm_x2=perm_x2,
        perm_y=[1, 0, 2],
        batch_split_factor=split,
    )
    assert actual.is_contiguous() and actual.dtype == dtype
    reference.assert_close(actual, expected, dtype, factor=2)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"perm_x1": [1, 1, 2]}, "permX1"),
    ({"perm_y": [0, 1, 2]}, "permY"),
    ({"perm_x2": [0, 2, 1]}, "permX1 .1, 0, 2. for permX2"),
    ({"batch_split_factor": 3}, "has to divide the 4 batches"),
    ({"weight": torch.zeros(4, 9, 16)}, "batches of 8 rows"),
    ({"bias": torch.zeros(16)}, "is reserved"),
    ({"scale": torch.zeros(64, dtype=torch.int64)}, "not implemented"),
    ({"weight": torch.zeros(4, 8, 16).half()}, "must have the dtype"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[next(iter(c)) + m[:8] for c, m in REFUSALS])
def test_illegal_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"input": torch.zeros(4, 5, 8), "weight": torch.zeros(4, 8, 8)} | change
    if "perm_x2" in change:
        arguments["weight"] = torch.zeros(4, 16, 8)
    moved = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_transpose_batchmatmul(**moved)
