"""One decode step of a small Qwen3 with a static KV cache, and transformers' Qwen3 as its reference."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def reference_model() -> Qwen3ForCausalLM:
    """transformers' model on the CPU in float32; weights are large enough for logits that differ clearly."""
    torch.manual_seed(0)
    config = Qwen3Config(**{**CONFIG.to_dict(), "initializer_range": 0.2, "attn_implementation": "eager"})
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def reference_logits(tokens: Tensor) -> Tensor:
    """Logits [batch, steps, vocabulary] of the whole sequences `tokens` [batch, steps] at once."""
    return reference_model()(tokens).logits


class PlainOps:
    """The step's building blocks in operators that every PyTorch device has."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, epsilon), total

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, 1, heads, head_dim]; cos and sin [batch, 1, 1, head_dim]."""
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class FusedOps(PlainOps):
    """The same in torch_npu's fused operators."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return torch_npu.npu_rms_norm(x, weight, epsilon)[0]

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon)
        return normed, total

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch_npu.npu_rotary_mul(x, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return torch_npu.npu_swiglu(gate_up, dim=-1)


class Layer(nn.Module):
    """A decoder layer; its KV cache [batch, length, kv_heads, head_dim] is part of it."""

    def __init__(self, layer: nn.Module, ops: PlainOps, batch: int, length: int) -> None:
        super().__init__()
        self.ops = ops
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = nn.Parameter(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
        )
        self.out = nn.Parameter(attention.o_proj.weight.detach())
        self.q_norm = nn.Parameter(attention.q_norm.weight.detach())
        self.k_norm = nn.Parameter(attention.k_norm.weight.detach())
        self.gate_up = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach())
        self.down = nn.Parameter(mlp.down_proj.weight.detach())
        self.input_norm = nn.Parameter(layer.input_layernorm.weight.detach())
        self.post_norm = nn.Parameter(layer.post_attention_layernorm.weight.detach())
        shape = (batch, length, CONFIG.num_key_value_heads, CONFIG.head_dim)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def attend(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads, kv_heads, size = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
        batch = x.shape[0]
        qkv = nn.functional.linear(x, self.qkv)
        q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
        q = self.ops.rms_norm(q.reshape(batch, 1, heads, size), self.q_norm, CONFIG.rms_norm_eps)
        k = self.ops.rms_norm(k.reshape(batch, 1, kv_heads, size), self.k_norm, CONFIG.rms_norm_eps)
        q, k = self.ops.rotate(q, cos, sin), self.ops.rotate(k, cos, sin)
        rows = torch.arange(batch, device=x.device)
        self.keys.index_put_((rows, positions), k.squeeze(1))
        self.values.index_put_((rows, positions), v.reshape(batch, kv_heads, size))
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, size)
        scores = torch.matmul(grouped, self.keys.permute(0, 2, 3, 1)) * size**-0.5
        seen = torch.arange(self.keys.shape[1], device=x.device) <= positions[:, None]
        weights = scores.masked_fill(~seen[:, None, None, :], float("-inf")).softmax(-1)
        return nn.functional.linear(torch.matmul(weights, self.values.transpose(1, 2)).reshape(batch, -1), self.out)

    def forward(
        self, x: Tensor, residual: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x` [batch, hidden] is already normed; returns the MLP's output and the residual it has to be added to."""
        x, residual = self.ops.add_rms_norm(
            self.attend(x, positions, cos, sin), residual, self.post_norm, CONFIG.rms_norm_eps
        )
        hidden = self.ops.swiglu(nn.functional.linear(x, self.gate_up))
        return nn.functional.linear(hidden, self.down), residual


class DecodeStep(nn.Module):
    """tokens [batch] at `positions` [batch] -> logits [batch, vocabulary]; the KV caches are updated."""

    def __init__(self, ops: PlainOps, batch: int, length: int = 32) -> None:
        super().__init__()
        model = reference_model().model
        self.ops = ops
        self.embedding = nn.Parameter(model.embed_tokens.weight.detach())
        self.layers = nn.ModuleList(Layer(layer, ops, batch, length) for layer in model.layers)
        self.norm = nn.Parameter(model.norm.weight.detach())
        self.head = nn.Parameter(reference_model().lm_head.weight.detach())
        positions = torch.arange(length)[None]
        cos, sin = model.rotary_emb(torch.zeros(1), positions)
        self.register_buffer("cos", cos[0].detach())
        self.register_buffer("sin", sin[0].detach())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        cos = self.cos[positions][:, None, None, :]
        sin = self.sin[positions][:, None, None, :]
        residual = nn.functional.embedding(tokens, self.embedding)
        x = self.ops.rms_norm(residual, self.layers[0].input_norm, CONFIG.rms_norm_eps)
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, positions, cos, sin)
            last = index + 1 == len(self.layers)
            weight = self.norm if last else self.layers[index + 1].input_norm
            x, residual = self.ops.add_rms_norm(x, residual, weight, CONFIG.rms_norm_eps)
        return nn.functional.linear(x, self.head)
