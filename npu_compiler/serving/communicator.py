"""Collectives of vLLM's parallel groups over HCCL."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase


class NPUCommunicator(DeviceCommunicatorBase):
    """HCCL behind vLLM's communicator interface. Every call runs on the current stream and can be captured.

    The device's group is found in torch under vLLM's name too, such as "tp:0" (of which there is one a process and
    engine): operators that compute and communicate take a group by name (fusion_kernels/matmul_all_reduce.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.device_group is not None and self.unique_name:
            _register_process_group(self.unique_name, self.device_group)
        if self.use_all2all:
            # What vLLM asks about the ranks of experts. Their tokens are gathered by the layers (moe_runner.py).
            from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager

            self.all2all_manager = AgRsAll2AllManager(self.cpu_group)

    def destroy(self) -> None:
        """See DeviceCommunicatorBase: called before the group is destroyed."""
        if self.device_group is not None and self.unique_name:
            _unregister_process_group(self.unique_name)
        super().destroy()

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """Sum over the group, as a new tensor: vLLM's operator promises not to change its argument."""
        output = input_.clone()
        dist.all_reduce(output, group=self.device_group)
        return output

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Gathers rows of every rank in rank order; `sizes` are the rows of each rank, None for equal ones."""
        if dim != 0:
            raise NotImplementedError(f"all_gatherv gathers rows (dim 0), dim {dim} was asked for")
        if isinstance(input_, list):
            return [self._gather_rows(one, sizes) for one in input_]
        return self._gather_rows(input_, sizes)

    def _gather_rows(self, rows: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        if sizes is None or len(set(sizes)) == 1:
            output = rows.new_empty((rows.shape[0] * self.world_size, *rows.shape[1:]))
            dist.all_gather_single(output, rows.contiguous(), group=self.device_group)
            return output
        # HCCL gathers equal parts: pad to the largest rank, then drop the padding.
        largest = max(sizes)
        padded = rows.new_zeros((largest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty((self.world_size, largest, *rows.shape[1:]))
        dist.all_gather_single(gathered, padded, group=self.device_group)
        return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])
