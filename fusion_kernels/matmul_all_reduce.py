"""A matrix product and the sum of it over a process group: the row-parallel linear of tensor parallelism.

CANN: aclnnMatmulAllReduce (`npu_mm_all_reduce_base`) sends finished parts of the product while it computes the next
ones. It is for Atlas A2 only, and its page asks to use it where a prompt is read and not in a decode step; hence
`rows`. Which of the two ways a call takes has to be the same on all ranks: it is decided from what all ranks have in
common, the shape and dtype of x and the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from npu_compiler.fusion_kernels.operator import FusedOperator, Provider
from npu_compiler.graph.groups import ranks_of

HALF = (torch.float16, torch.bfloat16)
RANKS = (1, 2, 4, 8)


def matmul_all_reduce_reference(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, rows: int) -> Tensor:
    """The sum over the ranks of `group` of x @ weight + bias; x [.., M, K], weight [K, N], bias [N] or None, each
    rank's own. The local product is rounded to x's dtype before it is summed.

    Args:
        group: name of a process group, as `torch.ops._c10d_functional` takes it.
        rows: fewest rows (M, and what stands before it) that are worth one operator; no part of the meaning.
    """
    product = torch.matmul(x, weight)
    if bias is not None:
        product = product + bias if x.dim() != 2 else torch.addmm(bias, x, weight)
    dist.all_reduce(product, group=_resolve_process_group(group))
    return product


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, rows: int) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[1]), dtype=x.dtype, device=x.device)


def _cann(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, rows: int) -> Tensor:
    # The communicator is named by its device here (torch_npu calls it a rank and takes it modulo the devices); its
    # name differs from run to run, so it is asked for at the call and never part of a program.
    backend = _resolve_process_group(group)._get_backend(x.device)
    name = backend.get_hccl_comm_name(x.device.index)
    return torch.ops.npu.npu_mm_all_reduce_base(x, weight, name, bias=bias)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, rows: int) -> str:
    if x.dtype not in HALF:
        return f"{x.dtype} is not float16 or bfloat16"
    if not x.numel():
        return "empty tensors are not taken"
    if x.numel() // x.shape[-1] < rows:
        return f"{x.numel() // x.shape[-1]} rows, fewer than the option matmul_all_reduce={rows}"
    if not x.is_contiguous():
        return "x is not contiguous"
    ranks = ranks_of(group)
    if not ranks:
        return f"there is no process group {group!r}"
    return "" if ranks in RANKS else f"{ranks} ranks, the operator takes {RANKS}"


def _example(dtype: torch.dtype) -> tuple[Any, ...]:
    # "0" is the name of the default group
    return torch.randn(5, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype), torch.randn(48, dtype=dtype), "0", 1


MATMUL_ALL_REDUCE = FusedOperator(
    "matmul_all_reduce(Tensor x, Tensor weight, Tensor? bias, str group, int rows) -> Tensor",
    reference=matmul_all_reduce_reference,
    fake=_fake,
    providers=(
        Provider("aclnnMatmulAllReduce", _cann, ("npu::npu_mm_all_reduce_base",), _refuses),
        Provider("composition", matmul_all_reduce_reference),
    ),
    example=_example,
)
