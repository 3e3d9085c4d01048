"""What vLLM's V1 runner launches as Triton kernels on every step, as torch operators on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    slot_mapping_ptr: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """Writes the KV-cache slot of every token of the batch, and PAD_ID behind them.

    Parameter names are the kernel's (vllm/v1/worker/block_table.py), which is how vLLM binds an override.
    `query_start_loc_ptr` [requests + 1] int32, `positions_ptr` [num_tokens] int64, `block_table_ptr`
    [max requests, blocks a request] int32, `slot_mapping_ptr` [max_num_tokens] int64 (written). No value is read on
    the host, so the step is not held up.
    """
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError(
            f"context parallelism of size {TOTAL_CP_WORLD_SIZE} is not served on npu; set the context parallel sizes "
            "to 1"
        )
    requests = query_start_loc_ptr.shape[0] - 1
    column = torch.div(positions_ptr, KV_CACHE_BLOCK_SIZE, rounding_mode="floor")
    if num_tokens == requests:  # a request in a batch has at least one token, so each has one: all decode
        blocks = block_table_ptr[:requests].gather(1, column.unsqueeze(1)).squeeze(1)
    else:
        lengths = query_start_loc_ptr[1:] - query_start_loc_ptr[:-1]
        rows = torch.arange(requests, device=positions_ptr.device)
        blocks = block_table_ptr[torch.repeat_interleave(rows, lengths, output_size=num_tokens), column]
    offset = torch.sub(positions_ptr, column, alpha=KV_CACHE_BLOCK_SIZE)
    torch.add(offset, blocks, alpha=KV_CACHE_BLOCK_SIZE, out=slot_mapping_ptr[:num_tokens])
    slot_mapping_ptr[num_tokens:max_num_tokens].fill_(PAD_ID)


OVERRIDES = {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": compute_slot_mapping}
