"""docs/rules.md has every pass and rule, as they are."""

from __future__ import annotations

from tests.passes.rules_page import PAGE, page


def test_page_is_as_the_rules_are() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.passes.rules_page"


def test_its_programs_are_python() -> None:
    blocks = PAGE.read_text().split("```python\n")[1:]
    exec("\n".join(block.split("```")[0] for block in blocks), {})
