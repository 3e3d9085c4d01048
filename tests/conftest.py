"""Test runs and test modules know little of each other: vLLM's compile cache starts empty, and no garbage piles up."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

import pytest
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    """Before vLLM is imported. A compiled graph of an earlier run would come from the cache, and no rule would run."""
    folder = tempfile.TemporaryDirectory(prefix="vllm_cache_")
    config.add_cleanup(folder.cleanup)
    os.environ["VLLM_CACHE_ROOT"] = folder.name
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # a thread an engine, for ever
    settings.register_profile("untimed", settings(), deadline=None)  # other programs take time too
    settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def collected_garbage() -> None:
    """What the modules before left alive is out of the garbage collector's sight: otherwise each collection, of which
    vLLM makes several for an engine, would walk through all that they imported and cached."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests that ran before it in the same worker."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
