"""Every test starts without compiled graphs."""

from __future__ import annotations

from tests.compiler.conftest import fresh_dynamo

__all__ = ["fresh_dynamo"]
