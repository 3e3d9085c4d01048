"""Every test starts without compiled graphs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from npu_compiler.backend import ascend


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch keeps a function that was loaded from a file as long as the module and the classes that its guards look at.
    monkeypatch.setattr(ascend, "_compiled", weakref.WeakSet())
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()
