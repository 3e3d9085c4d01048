"""Paged attention of vLLM's V1 engine on `npu_fused_infer_attention_score`.

Layouts. A step's queries lie one request behind the other ("TND": tokens, heads, head size). A layer's KV cache is one
piece of memory, its first half keys and its second half values: the operator takes them as two contiguous tensors.
Each is [blocks, BLOCK_SIZE, kv heads, head size], or, where the compiler found that one kernel can go from the layer's
QKV projection to its cache (qkv_attention.py), in that kernel's fractal order ("PA_NZ"):
[blocks, kv heads * head size / FRACTAL, BLOCK_SIZE, FRACTAL]. A block is one piece of memory either way.

Lengths. The operator takes the sequence lengths as host integers. In a full graph they are therefore replaced before
each replay reaches the operator: graph_updates.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch_npu
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from npu_compiler.errors import UnservedError
from npu_compiler.serving.graph_updates import AttentionCall, GraphUpdates
from npu_compiler.serving.padding import spread_padding
from npu_compiler.serving.places import here
from npu_compiler.serving.plain_attention import Extras, attend

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

    from npu_compiler.serving.qkv_attention import PackedQKV

BLOCK_SIZE = 128
"""Tokens a block. The operator's paged form takes multiples of 128 up to 512 (aclnnFusedInferAttentionScoreV3)."""
FRACTAL = 16
"""Elements of a head that lie side by side in the fractal order: 32 bytes of float16 or bfloat16."""
MASK_SIZE = 2048
"""Side of the causal mask the operator wants with sparse_mode 3, whatever the lengths."""
UPDATES_KEY = "npu_graph_updates"
"""Where a full graph under capture leaves its GraphUpdates in the forward context's additional_kwargs."""


class NPUAttentionBackend(AttentionBackend):
    """Decoder attention with a paged cache. Registered under the name vLLM keeps for plugins."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[NPUAttentionImpl]:
        return NPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[NPUAttentionMetadataBuilder]:
        return NPUAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[Any]:
        return [BLOCK_SIZE]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Layer outermost: the halves of a layer's memory are then whole key and value caches.
        return (KVCacheLayout.LBNHC,)


@dataclass
class NPUAttentionMetadata(AttentionMetadata):
    """One step's batch, for all layers of a KV cache group.

    `query_ends` [rows]: cumulative query tokens; `kv_lengths` [rows]: tokens in the cache. Both are host integers and
    cover `num_tokens` queries, padding included.
    """

    num_tokens: int
    query_ends: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    """[rows, blocks a request] int32"""
    slot_mapping: Tensor
    """[num_tokens or more] int64, all of them valid slots"""
    mask: Tensor
    """[MASK_SIZE, MASK_SIZE] bool, True where a key must not be seen"""
    query_starts: Tensor
    """[requests + 1] int32, on the device, for attention by plain operators"""
    lengths: Tensor
    """[requests] int32, likewise: tokens in the cache"""


class NPUAttentionMetadataBuilder(AttentionMetadataBuilder[NPUAttentionMetadata]):
    """Builds the step's metadata without reading anything back from the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.mask = torch.triu(torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool), diagonal=1).to(device)
        mode = vllm_config.compilation_config.cudagraph_mode
        self.captures_mixed = mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_requests = vllm_config.scheduler_config.max_num_seqs
        self.block_table: Tensor | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> NPUAttentionMetadata:
        common = common_attn_metadata
        query_starts = common.query_start_loc_cpu.tolist()
        query_lengths = [end - start for start, end in itertools.pairwise(query_starts)]
        if common.seq_lens_cpu_upper_bound is None:
            raise RuntimeError(
                "vLLM gave no sequence lengths on the host (seq_lens_cpu_upper_bound); npu attention needs them, as "
                "reading them from the device would hold up every step"
            )
        kv_lengths = common.seq_lens_cpu_upper_bound.tolist()
        block_table = common.block_table_tensor
        if self.captures_mixed:
            block_table = self._with_padding_rows(block_table, common.num_actual_tokens)
            extra = block_table.shape[0] - len(query_lengths)
            query_lengths += [0] * extra
            kv_lengths += [0] * extra
        query_ends, kv_lengths = spread_padding(query_lengths, kv_lengths, common.num_actual_tokens, self.max_model_len)
        # Padding has slot -1. The operator takes valid slots only, so padding goes to vLLM's null block (block 0).
        common.slot_mapping.clamp_(min=0)
        return NPUAttentionMetadata(
            num_tokens=common.num_actual_tokens,
            query_ends=query_ends,
            kv_lengths=kv_lengths,
            block_table=block_table,
            slot_mapping=common.slot_mapping,
            mask=self.mask,
            query_starts=common.query_start_loc,
            lengths=common.seq_lens,
        )

    def _with_padding_rows(self, block_table: Tensor, num_tokens: int) -> Tensor:
        """The block table with rows of null blocks behind it, at an address that stays the same for all steps.

        A graph for mixed batches has more tokens than its batch. Rows of their own keep them away from the last
        request, whose causal diagonal they would shift.
        """
        extra = -(-num_tokens // self.max_model_len)
        if self.block_table is None:
            most = -(-self.vllm_config.scheduler_config.max_num_batched_tokens // self.max_model_len)
            self.block_table = block_table.new_zeros((self.max_requests + most, block_table.shape[1]))
        rows = block_table.shape[0]
        table = self.block_table[: rows + extra]
        table[:rows].copy_(block_table)
        table[rows:].zero_()
        return table


class NPUAttentionImpl(AttentionImpl[NPUAttentionMetadata]):
    """One layer's attention: writes the new keys and values to the cache, then attends."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        longest = get_current_vllm_config().model_config.max_model_len
        self.extras = Extras(
            window=sliding_window if sliding_window is not None and sliding_window < longest else None,
            soft_cap=logits_soft_cap or None,
            slopes=None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32, device="npu"),
            sinks=sinks,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.cache_owner = kv_sharing_target_layer_name
        self.fractal: bool | None = False if self.extras else None
        """The order of the cache. The layer's first call decides it for good; vLLM makes it before there is a cache."""

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: NPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [tokens, heads, head size]; key, value [tokens, kv heads, head size]; writes `output`.

        Without metadata (vLLM's memory profiling) there is no cache to attend to, and `output` is zeroed.
        """
        fractal = self._is_fractal(otherwise=False)
        if attn_metadata is None:
            return output.zero_()
        tokens = attn_metadata.num_tokens
        key_cache, value_cache = self._caches(kv_cache, fractal)
        if self.cache_owner is None and key is not None:
            torch_npu.npu_scatter_pa_kv_cache(
                key[:tokens].contiguous(),
                value[:tokens].contiguous(),
                key_cache,
                value_cache,
                attn_metadata.slot_mapping[:tokens],
                cache_mode="PA_NZ" if fractal else "Norm",
            )
        return self._attend(layer, query[:tokens].contiguous(), key_cache, value_cache, attn_metadata, output)

    def forward_packed(
        self,
        layer: AttentionLayer,
        packed: PackedQKV,
        kv_cache: Tensor,
        attn_metadata: NPUAttentionMetadata | None,
        output: Tensor,
    ) -> Tensor:
        """As `forward`, from the layer's projection. Where its cache is not in fractal order, or another layer's, the
        projection is taken apart first."""
        fractal = self._is_fractal(otherwise=True)
        if attn_metadata is None:
            return output.zero_()
        if not fractal or self.cache_owner is not None:
            query, key, value = packed.unpacked(self.num_heads, self.num_kv_heads)
            return self.forward(layer, query, key, value, kv_cache, attn_metadata, output)
        tokens = attn_metadata.num_tokens
        key_cache, value_cache = self._caches(kv_cache, fractal)
        slots = attn_metadata.slot_mapping[:tokens]
        query = packed.write(key_cache, value_cache, slots, tokens, self.num_heads, self.num_kv_heads)
        return self._attend(layer, query, key_cache, value_cache, attn_metadata, output)

    def _attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        attn_metadata: NPUAttentionMetadata,
        output: Tensor,
    ) -> Tensor:
        if self.extras:
            if self.fractal:
                raise UnservedError(
                    f"attention with {self.extras} over the cache of {self.cache_owner}, which is in fractal order, is "
                    "not served on npu",
                    where=here(layer.layer_name),  # type: ignore[attr-defined]  # of every layer of vLLM's
                    rule="plain operators read caches in the plain order only",
                    fix="leave the pass out that chooses the order: --additional-config "
                    '\'{"compile": {"disabled_passes": ["qkv_attention"]}}\'',
                )
            return self._attend_plainly(query, key_cache, value_cache, attn_metadata, output)
        call = AttentionCall(
            query=query,
            key=self._for_operator(key_cache),
            value=self._for_operator(value_cache),
            block_table=attn_metadata.block_table,
            mask=attn_metadata.mask,
            output=output[: attn_metadata.num_tokens],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            block_size=BLOCK_SIZE,
        )
        updates: GraphUpdates | None = get_forward_context().additional_kwargs.get(UPDATES_KEY)
        if updates is None:
            call.run(attn_metadata.query_ends, attn_metadata.kv_lengths)
        else:
            updates.capture(layer.layer_name, call, attn_metadata)  # type: ignore[attr-defined]
        return output

    def _attend_plainly(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, step: NPUAttentionMetadata, output: Tensor
    ) -> Tensor:
        found = attend(
            query, key_cache, value_cache, step.block_table, step.query_starts, step.lengths, self.scale, self.extras
        )
        output[: step.num_tokens].copy_(found.view_as(output[: step.num_tokens]))
        return output

    def _is_fractal(self, otherwise: bool) -> bool:
        """Whether the cache is in fractal order; a layer called for the first time makes it `otherwise`."""
        if self.cache_owner is not None:
            owner = get_forward_context().no_compile_layers[self.cache_owner]
            self.fractal = bool(owner.impl.fractal)
        elif self.fractal is None:
            self.fractal = otherwise
        return self.fractal

    def _caches(self, kv_cache: Tensor, fractal: bool) -> tuple[Tensor, Tensor]:
        """Keys and values as views of the two halves of `kv_cache`, shaped as npu_scatter_pa_kv_cache wants them.

        `kv_cache` is vLLM's view [blocks, kv heads, block size, 2 * head size] of the layer's memory in LBNHC order.
        """
        flat = kv_cache.permute(0, 2, 1, 3).view(-1)
        if fractal:
            halves = flat.view(2, -1, self.num_kv_heads * self.head_size // FRACTAL, BLOCK_SIZE, FRACTAL)
        else:
            halves = flat.view(2, -1, BLOCK_SIZE, self.num_kv_heads, self.head_size)
        return halves[0], halves[1]

    def _for_operator(self, cache: Tensor) -> Tensor:
        """A half of the cache as the attention operator wants it: [blocks, block size, kv heads * head size], or in
        fractal order [blocks, kv heads, head size / FRACTAL, block size, FRACTAL]."""
        return cache.unflatten(1, (self.num_kv_heads, -1)) if self.fractal else cache.flatten(2)
