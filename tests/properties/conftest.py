"""The programs' own operators exist while the tests of this folder run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.properties.programs import written_operators


@pytest.fixture(scope="package", autouse=True)
def operators() -> Iterator[None]:
    with written_operators():
        yield
