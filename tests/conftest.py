"""Test runs know nothing of each other: vLLM's compile cache starts empty."""

from __future__ import annotations

import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before vLLM is imported. A compiled graph of an earlier run would come from the cache, and no rule would run."""
    folder = tempfile.TemporaryDirectory(prefix="vllm_cache_")
    config.add_cleanup(folder.cleanup)
    os.environ["VLLM_CACHE_ROOT"] = folder.name
