"""What stands in for vLLM's Triton kernels, against the same computed on the host."""

from __future__ import annotations

import pytest
import torch
import torch_npu  # noqa: F401  # the device

from npu_compiler.serving.triton_overrides import compute_slot_mapping

BLOCK, PAD, MOST = 128, -1, 16
BLOCKS = torch.tensor([[7, 3, 9], [2, 20_000_000, 4], [5, 1, 6]], dtype=torch.int32)
"""Of three requests; slots of the large one don't fit into 32 bits."""


def expected(lengths: list[int], positions: list[int]) -> list[int]:
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    table = BLOCKS.tolist()
    slots = [
        table[row][position // BLOCK] * BLOCK + position % BLOCK for row, position in zip(rows, positions, strict=True)
    ]
    return slots + [PAD] * (MOST - len(slots))


@pytest.mark.parametrize(
    ("lengths", "positions"),
    [
        pytest.param([1, 1, 1], [130, 255, 383], id="decode"),
        pytest.param([1, 1], [0, 128], id="decode_of_some_rows"),
        pytest.param([3, 1, 2], [126, 127, 128, 200, 0, 1], id="mixed"),
        pytest.param([2], [255, 256], id="one_prompt"),
    ],
)
def test_slots_of_a_batch(lengths: list[int], positions: list[int]) -> None:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    slots = torch.full((MOST,), 77, dtype=torch.int64).npu()
    given = (starts.npu(), torch.tensor(positions).npu(), BLOCKS.npu(), BLOCKS.shape[1], slots)
    compute_slot_mapping(len(positions), MOST, *given, BLOCK, 1, 0, 1, PAD, 1024)
    assert slots.tolist() == expected(lengths, positions)
