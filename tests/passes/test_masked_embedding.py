"""masked_embedding on vLLM's own code: each rank's rows, and their sum (its rule is tested in test_rules.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npu_compiler.config import Options
from npu_compiler.passes import masked_embedding, pipeline
from npu_compiler.passes.record import Pass
from tests.passes.lowered import apply, calls, lowered

vocabulary = pytest.importorskip("vllm.model_executor.layers.vocab_parallel_embedding")
PASS = Pass(masked_embedding.NAME, "", rules=masked_embedding.RULES)


def lookup(rank: int, ids: Tensor, weight: Tensor) -> Tensor:
    """What a rank of four does with a quarter of 320 rows (VocabParallelEmbedding.forward before the sum)."""
    mine, others = vocabulary.get_masked_input_and_mask(ids, 80 * rank, 80 * (rank + 1), 0, 320, 320)
    rows = torch.nn.functional.embedding(mine.long(), weight)
    return rows.masked_fill_(others.unsqueeze(-1), 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_every_rank(dtype: torch.dtype, inference: bool) -> None:
    """Before: 15 kernels. After: 5, on the first rank 4."""
    table = torch.randn(320, 16)
    ids = torch.randint(0, 320, (50,)).to(dtype)
    total = torch.zeros(50, 16)
    for rank in range(4):
        weight = table[80 * rank : 80 * (rank + 1)].clone()
        program = lowered(lambda ids, weight: lookup(rank, ids, weight), ids, weight, inference=inference).graph  # noqa: B023
        assert len(apply(PASS, program).fired) == 1
        pipeline.run(program, Options())
        left = [name for name in calls(program) if "unsqueeze" not in name]
        assert left == [
            *(["aten.sub.Tensor"] if rank else []),
            *("aten.clamp.default", "aten.ne.Tensor", "aten.embedding.default", "aten.masked_fill_.Scalar"),
        ]
        (rows,) = program(ids, weight)
        total += rows
    torch.testing.assert_close(total, table[ids.long()])
