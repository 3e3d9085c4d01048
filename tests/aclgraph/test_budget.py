"""A shape that does not fit into what captures may take runs uncaptured, says so once, and gives the right results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from npu_compiler.config import Options
from npu_compiler.errors import CaptureBudgetWarning, OptionError
from tests.aclgraph.test_pool import rows, wide
from tests.compiler.test_capture import Compiled


def served(sizes: Sequence[int], **options: Any) -> tuple[Compiled, list[str]]:
    """Calls `wide` with each size, compares with the CPU, and returns the warnings about budgets."""
    compiled = Compiled(wide, options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CaptureBudgetWarning)
        for size in sizes:
            x = rows(size)
            torch.testing.assert_close(compiled(x).cpu(), wide(x.cpu()))
    return compiled, [str(entry.message) for entry in caught if entry.category is CaptureBudgetWarning]


def captured(compiled: Compiled) -> list[int]:
    return [int(entry.key.rpartition("=")[2]) for entry in compiled.ledger.captures]


def test_memory() -> None:
    """wide has two results of 128 KiB a row: 256 rows need 64 MiB, 64 rows need 16."""
    compiled, said = served([256, 64, 256, 64, 256], capture_budget_mib=48)
    ledger = compiled.ledger
    assert captured(compiled) == [64]
    assert ledger.replays == 1
    (warning,) = said
    assert "=256 uncaptured: 0 MiB are taken, about 64" in warning
    assert "capture_budget_mib is 48" in warning
    ((reason, count),) = [(reason, count) for reason, count in ledger.uncaptured.items() if "does not fit" in reason]
    assert count == 2
    assert reason in str(ledger)
    assert sum(entry.mebibytes for entry in ledger.captures) <= 48


def test_listed_sizes_are_looked_at_before_the_first_capture() -> None:
    compiled, said = served([16], capture_sizes=[16, 64, 256], capture_budget_mib=48)
    assert not said
    assert compiled.ledger.outlook.startswith("budget: 2 of 3 sizes fit, estimated ")
    assert compiled.ledger.outlook.endswith(" of 48 MiB, 2 streams; not 256")
    assert str(compiled.ledger).startswith(compiled.ledger.outlook)
    assert 16 <= compiled.ledger.captures[0].mebibytes <= 48, "room for 64 rows, not for 256"


def test_time_is_measured_and_what_is_captured_stays() -> None:
    compiled, said = served([8, 16], capture_budget_seconds=0.01)
    spent = sum(entry.milliseconds for entry in compiled.ledger.captures)
    assert captured(compiled)[:1] == [8]
    while len(said) == 0 and spent < 100:  # a fast machine: more shapes until the time is used up
        size = 24 + 8 * len(compiled.ledger.captures)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CaptureBudgetWarning)
            compiled(rows(size))
        said += [str(entry.message) for entry in caught if entry.category is CaptureBudgetWarning]
    assert len(said) == 1
    assert "capture_budget_seconds is 0.01" in said[0]
    replays = compiled.ledger.replays
    compiled(rows(8))
    assert compiled.ledger.replays == replays + 1


def test_streams() -> None:
    compiled, said = served([8, 16, 24, 8, 16], capture_budget_streams=2)
    assert captured(compiled) == [8, 16]
    assert compiled.ledger.replays == 2
    assert len(said) == 1
    assert "2 streams are taken, about 1 more are needed, capture_budget_streams is 2" in said[0]


def test_streams_of_a_graph_that_was_driven_out_are_free_again() -> None:
    compiled, said = served([8, 16, 24, 8], capture_budget_streams=3, capture_limit=2)
    assert captured(compiled) == [8, 16, 24, 8]
    assert not said


def test_device_without_memory() -> None:
    """The rest of the device is taken, so the capture finds no memory for a result that the run before it had."""
    compiled = Compiled(wide)
    torch.testing.assert_close(compiled(x := rows(8)).cpu(), wide(x.cpu()))
    large = rows(192)
    torch.npu.empty_cache()
    share = (torch.npu.memory_reserved() + (60 << 20)) / torch.npu.mem_get_info()[1]
    torch.npu.set_per_process_memory_fraction(share)
    try:
        with pytest.warns(CaptureBudgetWarning, match="=192 uncaptured: the device has no memory left"):
            result = compiled(large)
        torch.testing.assert_close(result.cpu(), wide(large.cpu()))
        torch.testing.assert_close(compiled(x).cpu(), wide(x.cpu()))
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)
    assert captured(compiled) == [8]
    assert compiled.ledger.replays == 1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_no_budget(value: float) -> None:
    with pytest.raises(OptionError, match="is no budget"):
        Options.of({"capture_budget_mib": value})


def test_a_whole_number_is_a_budget_too() -> None:
    assert Options.of({"capture_budget_mib": 48}).capture_budget_mib == 48.0
