"""Which part of the device a call keeps busy. An NPU has matrix units, vector units, copy engines and links; calls on
different ones can run side by side."""

from __future__ import annotations

import enum

import torch
from torch import fx

from npu_compiler.graph.traffic import launches


class Engine(enum.Enum):
    """A part of the device; HOST is for calls that launch nothing (views, arithmetic on sizes, empty tensors)."""

    MATRIX = "matrix"
    VECTOR = "vector"
    COPY = "copy"
    LINK = "link"
    HOST = "host"


COPIES = frozenset({"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::view_copy"})
MATRIX_WORDS = ("matmul", "conv", "linear", "attention", "flash", "quant_mm")
MATRIX_OPERATORS = frozenset(
    f"aten::{name}"
    for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_scaled_mm", "einsum")
)
LINKS = ("_c10d_functional", "c10d", "symm_mem")
LINK_WORDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast_", "mc2_", "moe_distribute")


def engine_of(node: fx.Node) -> Engine:
    """The engine of a call, from its operator's name. What no table names is a vector call: most operators are.

    An operator that computes and communicates (npu_mm_all_reduce_base) counts as LINK, the scarcer one.
    """
    if not launches(node):
        return Engine.HOST
    target = node.target
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)
    namespace, _, base = name.rpartition("::")
    if base.startswith("empty"):
        return Engine.HOST
    if namespace in LINKS or any(word in base for word in LINK_WORDS):
        return Engine.LINK
    if name in MATRIX_OPERATORS or any(word in base for word in MATRIX_WORDS):
        return Engine.MATRIX
    return Engine.COPY if name in COPIES else Engine.VECTOR
