"""Compiled programs on two ranks over HCCL."""

from __future__ import annotations

import pytest

from tests import ranks

MODULE = "tests.compiler.rank_checks"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ranks.Reports:
    return ranks.start(MODULE, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ranks.checks(MODULE))
def test_compiled(check: str, reports: ranks.Reports) -> None:
    ranks.passed(check, reports)
