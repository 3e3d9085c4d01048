"""The passes on what lies between two attentions of vLLM's encoders: from the attention's result to the next queries.

The whole model can't be had: the platform's attention serves decoders, and vLLM asks for it when it makes a layer.
RoBERTa and XLM-R are `BertModel` in vLLM, with other embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from transformers import ModernBertConfig
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.bert import BertIntermediate, BertOutput, BertSelfOutput
from vllm.model_executor.models.modernbert import ModernBertMLP

from npu_compiler.config import Options
from npu_compiler.graph.traffic import launches
from npu_compiler.passes import pipeline
from tests.passes import vllm_graphs
from tests.passes.lowered import lowered
from tests.passes.vllm_graphs import Shape

HIDDEN, HEADS, INNER, TOKENS = 256, 4, 512, 6


class Bert(nn.Module):
    """The rest of a layer of vLLM's BertModel, and the projection of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_output = BertSelfOutput(HIDDEN, 1e-12, prefix="a")
        self.intermediate = BertIntermediate(HIDDEN, INNER, "gelu", prefix="b")
        self.output = BertOutput(HIDDEN, INNER, 1e-12, prefix="c")
        self.qkv_proj = QKVParallelLinear(HIDDEN, HIDDEN // HEADS, HEADS, bias=True, prefix="d")

    def forward(self, attended: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        x = self.attention_output(attended, x)
        x = self.output(self.intermediate(x), x)
        return *self.qkv_proj(x)[0].split([HIDDEN] * 3, dim=-1), x


class ModernBert(nn.Module):
    """The same of a layer of vLLM's ModernBertModel."""

    def __init__(self) -> None:
        super().__init__()
        config = ModernBertConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS)
        self.wo = RowParallelLinear(HIDDEN, HIDDEN, bias=False, prefix="a")
        self.mlp_norm, self.attn_norm = (nn.LayerNorm(HIDDEN, eps=1e-5, bias=False) for _ in range(2))
        self.mlp = ModernBertMLP(config, prefix="b")
        self.qkv = QKVParallelLinear(HIDDEN, HIDDEN // HEADS, HEADS, bias=False, prefix="c")
        rope = {"rope_type": "default", "rope_theta": 1e4}
        self.rotary_emb = get_rope(HIDDEN // HEADS, 128, rope_parameters=rope, dtype=torch.bfloat16)

    def forward(self, attended: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x = x + self.wo(attended)[0]
        x = x + self.mlp(self.mlp_norm(x))
        q, k, v = self.qkv(self.attn_norm(x))[0].split([HIDDEN] * 3, dim=-1)
        return *self.rotary_emb(positions, q, k), v, x


@pytest.fixture(autouse=True, scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    config = vllm_graphs._configuration(Shape("llama"), tmp_path_factory.mktemp("llama"))
    with vllm_graphs._process_groups(config):
        yield


def kernels(model: nn.Module, *args: Any) -> tuple[list[str], list[str]]:
    """The kernels before and after the passes, without views and memory."""
    arguments = tuple(arg.to("npu") for arg in args)
    for arg in arguments:
        torch._dynamo.mark_dynamic(arg, 0)
    program = lowered(model.to("npu", torch.bfloat16), *arguments, dynamic=None, inference=True).graph

    def found() -> list[str]:
        return [str(node.target) for node in program.graph.nodes if launches(node)]

    before = found()
    pipeline.run(program, Options(check=True))
    return before, found()


def test_bert() -> None:
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    before, after = kernels(Bert(), x, x.clone())
    assert [name for name in after if "mm" not in name] == [
        "npu_fused.add_layer_norm.default",
        "aten.gelu.default",
        "npu_fused.add_layer_norm.default",
    ]
    assert (len(before), len(after)) == (9, 7)


def test_modernbert() -> None:
    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    before, after = kernels(ModernBert(), x, x.clone(), torch.arange(TOKENS))
    assert after.pop(1) == "aten.full.default", "zeros for the bias that the norms lack, once a model"
    assert [name for name in after if name != "aten.matmul.default"] == [
        "npu_fused.add_layer_norm.default",
        "npu_fused.geglu.default",
        "npu_fused.add_layer_norm.default",
        "npu_fused.qk_rope_cached.default",
    ]
    assert (len(before), len(after)) == (27, 8)
