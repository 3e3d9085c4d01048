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


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 70), (1, 4, 1, 70), (2, 4, 2, 70), (2, 4, 5, 70), (2, 4, 3, 64), (2, 4, 3, 96)]
)
def test_shifts_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="realShift"):
        attention(*operands(torch.float32), torch.randn(shape), 0)


def test_shifts_that_the_card_makes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"pseType.*has to be 0 or 1"):
        attention(*operands(torch.float32), torch.randn(2, 4, 3, 70), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "key_heads"), [(2, 2, 2), (1, 4, 2), (1, 12, 2), (3, 2, 1)])
@pytest.mark.parametrize(("keys", "width"), [(600, 16), (256, 64), (300, 128), (517, 80)])
def test_few_rows(keys: int, width: int, rows: int, heads: int, key_heads: int, dtype: torch.dtype) -> None:
    """Keys of several turns, the last of which fill no vector; some are hidden from every row, some from one."""
    query = torch.randn(2, heads, rows, width).to(dtype)
    key, value = (torch.randn(2, key_heads, keys, width).to(dtype) for _ in range(2))
    shift = torch.randn(2, heads, rows, keys).to(dtype)
    shift[..., 32:70] = -60000.0
    shift[:, 0, 0, 128:170] = float("-inf")
    shift[1, :, :, -keys // 3 :] = float("-inf")
    found = torch_npu.npu_fusion_attention_v2(
        query.npu(), key.npu(), value.npu(), heads, "BNSD", pse=shift.npu(), scale=width**-0.5, pse_type=0
    )
    for i in range(2):
        by_row = (item[i].transpose(0, 1) for item in (query, key, value))
        output, lse = reference.attention(*by_row, width**-0.5, bias=shift[i])
        reference.assert_close(found[0][i].transpose(0, 1), output, dtype)
        statistics = found[1][i, ..., 0].cpu().double() + found[2][i, ..., 0].cpu().double().log()
        reference.assert_close(statistics.T, lse, dtype)


@pytest.mark.parametrize("position", [1, 2])
def test_what_no_row_weighs_is_not_read(position: int) -> None:
    """Whatever a preallocated cache holds behind its last token; a group of keys that one row sees is read for all."""
    query, key, value = torch.randn(1, 2, 2, 64), torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64)
    shift = torch.zeros(1, 2, 1, 256)
    shift[..., 96:] = -1e30
    expected_output = torch.softmax((query @ key.mT).double() / 8 + shift, -1) @ value.double()
    (query, key, value)[position][..., 96:, :] = float("nan")
    found = torch_npu.npu_fusion_attention_v2(
        query.npu(), key.npu(), value.npu(), 2, "BNSD", pse=shift.npu(), scale=0.125, pse_type=0
    )
    reference.assert_close(found[0], expected_output, torch.float32)


@pytest.mark.parametrize("hidden", [-1e30, float("-inf")])
def test_rows_that_see_nothing(hidden: float) -> None:
    """-inf everywhere gives zeros; finite, the mean of the values; and neither has a part in the rows beside."""
    query, key, value = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    shift = torch.zeros(1, 2, 2, 300)
    shift[:, :, 0] = hidden
    found = torch_npu.npu_fusion_attention_v2(
        query.npu(), key.npu(), value.npu(), 2, "BNSD", pse=shift.npu(), scale=0.25, pse_type=0
    )[0].cpu()
    weights = torch.softmax((query @ key.mT).double() / 4, -1)
    weights[:, :, 0] = 0 if hidden == float("-inf") else 1 / 300
    reference.assert_close(found, weights @ value.double(), torch.float32)


def test_captured_once_and_replayed_on_other_contents() -> None:
    query, key, value = operands(torch.float32, rows=1, keys=256, width=64)
    shift = torch.zeros(2, 4, 1, 256)
    held = [item.npu() for item in (query, key, value, shift)]
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        found = torch_npu.npu_fusion_attention_v2(
            *held[:3], 4, "BSND", pse=held[3], scale=0.3, pse_type=0, sync=True
        )[0]  # fmt: skip
    for seen in (256, 40):
        shift[..., seen:] = -1e30
        for item in (query, key, value):
            item.normal_()
        for to, item in zip(held, (query, key, value, shift), strict=True):
            to.copy_(item)
        graph.replay()
        reference.assert_close(found, expected(query, key, value, shift, 0.3, False), torch.float32)


def test_packed_prompts_through_the_second_version() -> None:
    """TND: aclnnFlashAttentionVarLenScoreV2."""
    lengths = [3, 40]
    query, key, value = torch.randn(43, 4, 32), torch.randn(43, 2, 32), torch.randn(43, 2, 32)
    found = torch_npu.npu_fusion_attention_v2(
        query.npu(), key.npu(), value.npu(), 4, "TND", scale=0.2, actual_seq_qlen=[3, 43], actual_seq_kvlen=[3, 43]
    )[0]
    parts = zip(*(item.split(lengths) for item in (query, key, value)), strict=True)
    reference.assert_close(found, torch.cat([reference.attention(*part, 0.2)[0] for part in parts]), torch.float32)
