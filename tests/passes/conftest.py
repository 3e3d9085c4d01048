"""Simulated ranks for the passes that rewrite what several ranks do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import world


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many ranks a test has, all in this process: 2, or what it is parametrized with."""
    count = getattr(request, "param", 2)
    with world.group_of(count), torch.no_grad():
        yield count
