"""The vLLM platform plugin for the device `npu`: platform, worker, model runner, attention, graphs, communicator.

vLLM finds the two functions below through the entry points in pyproject.toml. docs/serving.md is the user's view.
"""

from __future__ import annotations

import importlib.util
import os

# What the plugin needs of vLLM's own environment settings. A value the user has set is left alone.
#   VLLM_USE_V2_MODEL_RUNNER: the second runner's kernels exist in Triton only.
#   VLLM_WORKER_MULTIPROC_METHOD: a device context does not survive a fork.
#   VLLM_MLA_DISABLE: latent attention (MLA) is served with its heads expanded; there is no kernel for the latent form.
#   VLLM_USE_MEGA_AOT_ARTIFACT: vLLM's one file for graph and kernels loads Inductor's artifacts only. With it off, vLLM
#   keeps Dynamo's graph in its file and asks our compiler for the programs, which it keeps beside it.
ENVIRONMENT_DEFAULTS = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_USE_MEGA_AOT_ARTIFACT": "0",
}


def platform_plugin() -> str | None:
    """The platform class's name for vLLM, or None where torch_npu is not installed."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return "npu_compiler.serving.platform.NPUPlatform"


def general_plugin() -> None:
    """Runs in every process of vLLM: makes the attention backend known under the name vLLM keeps for plugins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "npu_compiler.serving.attention.NPUAttentionBackend")
