"""Fused operators, `torch.ops.npu_fused.*`: one file a family, with schema, reference, fake and providers.

A provider is tried if the process has what it calls for the tensors at hand (see operator.py); no device is named.
"""

from __future__ import annotations

from npu_compiler.fusion_kernels.registry import OPERATORS, register

__all__ = ["OPERATORS", "register"]
