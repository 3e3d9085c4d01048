"""The list of fused operators, and their registration with torch."""

from __future__ import annotations

import functools

import torch
from torch import fx

from npu_compiler.fusion_kernels import watched
from npu_compiler.fusion_kernels.attention import ATTENTION
from npu_compiler.fusion_kernels.expert_dispatch import MC2_COMBINE, MC2_DISPATCH, MC2_DISPATCH_QUANT
from npu_compiler.fusion_kernels.expert_exchange import ALL_TO_ALL_COMBINE, ALL_TO_ALL_DISPATCH
from npu_compiler.fusion_kernels.geglu import GEGLU
from npu_compiler.fusion_kernels.geglu_quant import GEGLU_DYNAMIC_QUANT
from npu_compiler.fusion_kernels.gelu import FAST_GELU
from npu_compiler.fusion_kernels.layer_norm import ADD_LAYER_NORM
from npu_compiler.fusion_kernels.matmul_all_reduce import MATMUL_ALL_REDUCE
from npu_compiler.fusion_kernels.mul_add import MUL_ADD
from npu_compiler.fusion_kernels.norm_bias import ADD_RMS_NORM_BIAS
from npu_compiler.fusion_kernels.norm_quant import (
    ADD_RMS_NORM_DYNAMIC_QUANT,
    ADD_RMS_NORM_QUANT,
    RMS_NORM_DYNAMIC_QUANT,
    RMS_NORM_QUANT,
)
from npu_compiler.fusion_kernels.norms import (
    ADD_RMS_NORM,
    ADD_RMS_NORM_CAST,
    GEMMA_ADD_RMS_NORM,
    GEMMA_RMS_NORM,
    RMS_NORM,
)
from npu_compiler.fusion_kernels.operator import FusedOperator
from npu_compiler.fusion_kernels.rope import QK_NORM_ROPE, QK_ROPE
from npu_compiler.fusion_kernels.rope_cached import QK_ROPE_CACHED
from npu_compiler.fusion_kernels.row_collectives import (
    ALL_GATHER_COLUMNS,
    ALL_GATHER_ROWS,
    ALL_TO_ALL_ROWS,
    OWN_LAYER,
    REDUCE_SCATTER_ROWS,
    SHARD_ROWS,
    UNSHARD_ROWS,
)
from npu_compiler.fusion_kernels.swiglu import SILU_MUL, SWIGLU
from npu_compiler.fusion_kernels.swiglu_quant import SWIGLU_DYNAMIC_QUANT, SWIGLU_QUANT
from npu_compiler.fusion_kernels.transpose_bmm import TRANSPOSE_BMM

NAMESPACE = "npu_fused"
OPERATORS: tuple[FusedOperator, ...] = (
    RMS_NORM,
    ADD_RMS_NORM,
    ADD_RMS_NORM_CAST,
    ADD_RMS_NORM_BIAS,
    GEMMA_RMS_NORM,
    GEMMA_ADD_RMS_NORM,
    RMS_NORM_DYNAMIC_QUANT,
    ADD_RMS_NORM_DYNAMIC_QUANT,
    ADD_RMS_NORM_QUANT,
    RMS_NORM_QUANT,
    ADD_LAYER_NORM,
    QK_NORM_ROPE,
    QK_ROPE,
    QK_ROPE_CACHED,
    SWIGLU,
    SILU_MUL,
    SWIGLU_DYNAMIC_QUANT,
    SWIGLU_QUANT,
    GEGLU,
    GEGLU_DYNAMIC_QUANT,
    FAST_GELU,
    ATTENTION,
    TRANSPOSE_BMM,
    MATMUL_ALL_REDUCE,
    REDUCE_SCATTER_ROWS,
    ALL_GATHER_ROWS,
    SHARD_ROWS,
    UNSHARD_ROWS,
    ALL_TO_ALL_ROWS,
    ALL_GATHER_COLUMNS,
    OWN_LAYER,
    ALL_TO_ALL_DISPATCH,
    ALL_TO_ALL_COMBINE,
    MC2_DISPATCH,
    MC2_DISPATCH_QUANT,
    MC2_COMBINE,
    MUL_ADD,
)


@functools.cache
def register() -> torch.library.Library:
    """Defines the operators as `torch.ops.npu_fused.*`, once a process; the cache keeps the library alive."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for entry in OPERATORS:
        library.define(entry.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(entry.name, entry, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{entry.name}", entry.fake, lib=library)
    watched.register(library)
    fx.node.has_side_effect(torch.ops.npu_fused.all_to_all_dispatch.default)  # it counts what it drops
    return library
