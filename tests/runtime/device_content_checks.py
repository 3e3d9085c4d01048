"""Operators whose device memory holds what they must not read: each fails its own stream. Run as a program, because a
failed stream stays failed; prints one JSON object, case -> message of the failed synchronisation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch_npu

from tests.runtime.test_attention_operators import BLOCK, Paged
from tests.runtime.test_qkv_operators import Projection


def position_behind_the_cache() -> None:
    query = torch.randn(2, 32).npu()
    torch_npu.npu_mrope(torch.tensor([0, 9]).npu(), query, query, torch.randn(9, 32).npu(), 32)


def slot_behind_the_cache() -> None:
    caches = [torch.zeros(1, BLOCK, 1, 16).npu() for _ in range(2)]
    row = torch.zeros(1, 1, 16).npu()
    torch_npu.npu_scatter_pa_kv_cache(row, row, *caches, torch.tensor([BLOCK]).npu(), cache_mode="Norm")


def index_behind_the_cache() -> None:
    torch_npu.npu_qkv_rms_norm_rope_cache(**Projection(2, 1, 1, torch.float16, slots=[4, 160]).arguments())


def attention_with(change: dict[str, torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        case = Paged([1, 1], [7, 300], torch.float32)
        arguments: dict[str, Any] = case.arguments() | {k: v.npu() for k, v in change.items()}
        torch_npu.npu_fused_infer_attention_score(**arguments)

    return run


CASES: dict[str, Callable[[], None]] = {
    "position": position_behind_the_cache,
    "slot": slot_behind_the_cache,
    "index": index_behind_the_cache,
    "mask": attention_with({"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).tril()}),
    "block": attention_with({"block_table": torch.tensor([[0, 1, 2], [3, 99, 1]], dtype=torch.int32)}),
}


def main() -> None:
    """Runs every case on a stream of its own."""
    messages = {}
    for name, run in CASES.items():
        with torch.npu.stream(torch.npu.Stream()) as _:
            run()
            try:
                torch.npu.current_stream().synchronize()
                messages[name] = "no error"
            except RuntimeError as error:
                messages[name] = str(error)
    print("RESULT " + json.dumps(messages))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
