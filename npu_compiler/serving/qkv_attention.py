"""Attention from the packed QKV projection: the operator that passes/qkv_attention.py puts into a vLLM model.

Its first call for a layer comes before there is a cache (vLLM's profiling run), and makes the layer keep its cache in
the order that CANN's fused kernel writes (attention.py).
"""

# Annotations are types here, not text: torch reads the operator's schema from them, through vLLM's decorator.

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch_npu
from torch import Tensor
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

if TYPE_CHECKING:
    from npu_compiler.serving.attention import NPUAttentionImpl

NAMESPACE = "npu_serving"


@dataclass(frozen=True)
class PackedQKV:
    """A layer's projection, not yet normalised, rotated or split, within the limits of aclnnQkvRmsNormRopeCache
    (passes/qkv_attention.py proves them).

    qkv [tokens, (query heads + 2 * kv heads) * 128]; q_weight, k_weight [128]; cos, sin [tokens, 128], both halves
    filled; all float16 or all bfloat16.
    """

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    epsilon: float
    cos: Tensor
    sin: Tensor

    def write(
        self, key_cache: Tensor, value_cache: Tensor, slots: Tensor, tokens: int, num_heads: int, num_kv_heads: int
    ) -> Tensor:
        """Writes the keys and values of the first `tokens` tokens to the caches; returns their queries, in one kernel.

        Args:
            key_cache, value_cache: [blocks, kv heads * 128 / 16, block size, 16].
            slots: [tokens] int64.

        Returns:
            [tokens, num_heads, 128].
        """
        head_size = self.q_weight.shape[0]
        query = self.qkv.new_empty((tokens, num_heads * head_size))
        torch_npu.npu_qkv_rms_norm_rope_cache(
            self.qkv[:tokens],
            self.q_weight,
            self.k_weight,
            self.cos[:tokens],
            self.sin[:tokens],
            slots,
            query,
            key_cache,
            value_cache,
            [1, tokens, num_heads + 2 * num_kv_heads, head_size],
            [num_heads, num_kv_heads, num_kv_heads],
            epsilon=self.epsilon,
            cache_mode="PA_NZ",
        )
        return query.view(tokens, num_heads, head_size)

    def unpacked(self, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [tokens, heads, head size], by single operators."""
        heads = self.qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        weights = self.q_weight, self.k_weight, self.epsilon, self.epsilon
        query, key = torch.ops.npu_fused.qk_norm_rope(query, key, *weights, cos, sin)
        return query, key, value


@maybe_transfer_kv_layer
def qkv_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    output: Tensor,
    layer_name: LayerNameType,
) -> None:
    """Normalises, rotates, writes the layer's cache and attends; writes `output` [tokens, heads, head size]."""
    metadata, layer, kv_cache, _ = get_attention_context(_resolve_layer_name(layer_name))
    implementation = cast("NPUAttentionImpl", layer.impl)
    packed = PackedQKV(qkv, q_weight, k_weight, epsilon, cos, sin)
    implementation.forward_packed(layer, packed, kv_cache, metadata, output)


def _fake(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    output: Tensor,
    layer_name: LayerNameType,
) -> None:
    return None


@functools.cache
def register() -> torch.library.Library:
    """Defines torch.ops.npu_serving.qkv_attention, once a process; the cache keeps the library alive."""
    library = torch.library.Library(NAMESPACE, "DEF")
    direct_register_custom_op("qkv_attention", qkv_attention, ["output"], _fake, library)
    return library
