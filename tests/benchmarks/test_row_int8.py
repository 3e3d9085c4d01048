"""The int8 row's formats hold the same numbers, so that its contestants compute the same step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import decode_model, row_int8
from benchmarks.row_decode_step import TOLERANCE

SIZE = dataclasses.replace(decode_model.HIDDEN_32, layers=2, positions=32)


def test_weights_are_the_same_numbers_in_every_format() -> None:
    narrow, wide, widest = (row_int8.model(SIZE, *kind) for kind in ((True,), (False,), (False, torch.float32)))
    found = 0
    for name, module in narrow.named_modules():
        if isinstance(module, row_int8.Int8Linear):
            weight = module.weight.double() * module.scale.double()[:, None]
            assert module.weight.dtype == torch.int8 and module.weight.abs().max() >= 64
            for other in (wide, widest):
                linear = other.get_submodule(name)
                assert isinstance(linear, nn.Linear) and torch.equal(linear.weight.double(), weight)
            found += 1
    assert found == 7 * SIZE.layers + 1
    assert decode_model.weight_bytes(narrow) < 0.6 * decode_model.weight_bytes(wide)


@pytest.mark.parametrize("int8", [True, False])
def test_contestants_compute_the_same_step(int8: bool) -> None:
    right = row_int8.on_cpu("cpu eager", SIZE, compiled=False)().output
    found = row_int8.on_npu("ascend", SIZE, int8)().output
    assert right is not None and found is not None
    torch.testing.assert_close(found(), right(), rtol=0, atol=TOLERANCE[row_int8.DTYPE])
