"""Requests for `prompt_logprobs`, refused where the LM head is split over engines.

vLLM has an engine compute them by a call of the LM head of its own, behind the step, for which the other engines do not
come (`_get_prompt_logprobs_dict` in v1/worker/gpu_model_runner.py). Custom logits processors are where vLLM lets a
plugin refuse requests in every process of the front end, by the server's settings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class NoPromptLogprobs(LogitsProcessor):
    """Leaves logits as they are."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called in the front end.

        Raises:
            VLLMValidationError: the request wants `prompt_logprobs`.
        """
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "prompt_logprobs are not served where the LM head is split over data-parallel engines "
                "(additional_config: fine_grained_tp: lm_head): its engine alone would need the head for them; ask "
                "without, or start the server without that option"
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        """There is nothing to keep."""

    def apply(self, logits: Tensor) -> Tensor:
        """See LogitsProcessor."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """See LogitsProcessor."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """There is no state."""
