"""Inputs of a step that most steps leave as they are.

While the same requests decode, each has one token a step: where a request's tokens begin, whose they are, how many, and
which are left out does not change. vLLM copies all of it to the device at every step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

STEADY = ("query_start_loc", "discard_request_mask", "req_indices", "query_pos", "num_scheduled_tokens")
"""Buffers of vLLM's runner that the host alone writes, by `copy_to_gpu`: nothing changes them on the device."""


class SteadyBuffer(CpuGpuBuffer):
    """Copies to the device only what differs from what it copied before."""

    def __init__(self, *size: int | torch.SymInt, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(*size, dtype=dtype, device=device)
        self._sent = np.zeros_like(self.np)  # as the device's half begins

    def copy_to_gpu(self, n: int | None = None) -> Tensor:
        if np.array_equal(self._sent[:n], self.np[:n]):
            return self.gpu[:n]
        self._sent[:n] = self.np[:n]
        return super().copy_to_gpu(n)


def make_steady(runner: GPUModelRunner) -> None:
    """Gives a runner that has just been made SteadyBuffers for STEADY."""
    for name in STEADY:
        made: CpuGpuBuffer = getattr(runner, name)
        setattr(runner, name, SteadyBuffer(*made.cpu.shape, dtype=made.cpu.dtype, device=made.gpu.device))
