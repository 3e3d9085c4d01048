"""aclnnFlashAttentionScore and V2 with a shift of the scores (`pse`), against the documents' formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.runtime import reference
from tests.runtime.test_attention_operators import DTYPES

SHIFTS = {"[B, N, Sq, Skv]": (2, 4, 3, 70), "[B, N, 1, Skv]": (2, 4, 1, 70), "[1, N, Sq, Skv]": (1, 4, 3, 70)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def operands(dtype: torch.dtype, rows: int = 3, keys: int = 70, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads over two key heads, by row: [B, S, N, D]."""
    return (
        torch.randn(2, rows, 4, width).to(dtype),
        torch.randn(2, keys, 2, width).to(dtype),
        torch.randn(2, keys, 2, width).to(dtype),
    )


def expected(query: Tensor, key: Tensor, value: Tensor, shift: Tensor, scale: float, scaled_too: bool) -> Tensor:
    query, key, value = (item.double().transpose(1, 2) for item in (query, key, value))
    key, value = (item.repeat_interleave(2, dim=1) for item in (key, value))
    scores = query @ key.mT
    scores = (scores + shift.double()) * scale if scaled_too else scores * scale + shift.double()
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, shift: Tensor, pse_type: int, layout: str = "BSND") -> Tensor:
    found = torch_npu.npu_fusion_attention_v2(
        query.npu(), key.npu(), value.npu(), 4, layout, pse=shift.npu(), scale=0.3, pse_type=pse_type
    )
    return found[0].cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pse_type", [0, 1])
@pytest.mark.parametrize("shape", SHIFTS.values(), ids=SHIFTS)
def test_shift_before_and_behind_the_scale(shape: tuple[int, ...], pse_type: int, dtype: torch.dtype) -> None:
    query, key, value = operands(dtype)
    shift = torch.randn(shape).to(dtype)
    found = attention(query, key, value, shift, pse_type)
    reference.assert_close(found, expected(query, key, value, shift, 0.3, pse_type == 1), dtype)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_heads_first_views_and_shifts_that_repeat(rows: int) -> None:
    """Transposed heads and an expanded shift are read where they lie."""
    query, key, value = operands(torch.float32, rows=rows)
    shift = torch.randn(2, 1, 1, 70)
    heads_first = (item.transpose(1, 2) for item in (query, key, value))
    found = attention(*heads_first, shift.expand(2, 4, 1, 70), 0, "BNSD")
    reference.assert_close(found.transpose(1, 2), expected(query, key, value, shift, 0.3, False), torch.float32)


def test_first_version_scales_the_shift_too() -> None:
    query, key, value = operands(torch.float32)
    shift = torch.randn(2, 4, 3, 70)
    found = torch_npu.npu_fusion_attention(query.npu(), key.npu(), value.npu(), 4, "BSND", pse=shift.npu(), scale=0.3)
    reference.assert_close(found[0].cpu(), expected(query, key, value, shift, 0.3, True), torch.float32)


@pytest.mark.parametrize("hidden", [-1e30, float("-inf"), torch.finfo(torch.float32).min])
def test_keys_that_the_shift_hides(hidden: float) -> None:
    """The last half of the keys, and none of a row: those have no part in the result, whatever their values are."""
    query, key, value = operands(torch.float32, keys=300)
    shift = torch.zeros(2, 4, 1, 300)
    shift[..., 150:] = hidden
    found = attention(query, key, value, shift, 0)
    reference.assert_close(
        found, expected(query, key[:, :150], value[:, :150], shift[..., :150], 0.3, False), torch.float32
    )


@pytest.mark.parametrize("shape", [(2, 1, 3, 70), (1, 4, 1, 70), (2, 4, 2, 70), (2, 4, 3, 64)])
def test_shifts_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="realShift"):
        attention(*operands(torch.float32), torch.randn(shape), 0)


def test_shifts_that_the_card_makes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"pseType.*has to be 0 or 1"):
        attention(*operands(torch.float32), torch.randn(2, 4, 3, 70), 2)
