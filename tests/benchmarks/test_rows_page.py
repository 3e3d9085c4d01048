"""The page of figures: what it says of a row."""

from __future__ import annotations

from typing import Any

from benchmarks import rows_page

ABOUT = {"time": "2026-01-01T00:00:00Z", "machine": {"processor": "a processor"}, "quick": False}


def record(peer: str, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"row": "demo", "subject": "ours", "peer": peer, "unit": "us", "median": 250.0}
    plain |= {"ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0, "roof": None, "rest": None, "best_rival": None}
    plain |= {
        "conditions": None,
        "best_ratio": None,
        "goal": None,
        "met": None,
        "missing": None,
        "rounds": 9,
        "rejected": 2,
        "noisy": True,
    }
    return plain | more


def page(*records: dict[str, Any]) -> str:
    return rows_page.page({"demo": {"about": ABOUT, "records": records}}, {"demo": ["theirs", "absent"]})


def test_a_row() -> None:
    ours = record("ours", goal=">= 1.2x", met=False, best_rival="theirs", best_ratio=1.1)
    theirs = record("theirs", median=275.0, ratio=1.1, ratio_min=1.0, ratio_max=12.5)
    text = page(ours, theirs, record("absent", missing="not installed", ratio=None, median=None))
    assert "- `demo`, ours: >= 1.2x; reached 250 us, 1.100x of theirs\n" in text
    assert "| `demo` | ours | 250 us | 1 | >= 1.2x: missed |" in text
    assert "|  | theirs | 275 us | 1.10 (1.00 .. 12.5) |  |" in text
    assert "|  | absent | missing |  | not installed |" in text
    assert "| `demo` | 2026-01-01T00:00:00Z | 9, 2 disturbed, disturbed ones counted | - | - | a processor |" in text


def test_nothing_missed() -> None:
    assert "## Targets that are missed\n\nNone.\n" in page(record("ours", goal=">= 1.2x", met=True))


def test_slower_than_a_peer() -> None:
    """What is no peer, what is missing and what is slower is not in the list."""
    faster = {"median": 200.0, "ratio": 0.8, "ratio_min": 0.75, "ratio_max": 1.25}
    theirs, part = record("theirs", **faster), record("its part", **faster)
    listed = "## Slower than a peer\n\n" + rows_page.SLOWER + "\n\n"
    text = page(record("ours"), theirs, part, record("absent", missing="not installed", ratio=None, median=None))
    assert f"{listed}- `demo`: ours 250 us, theirs 200 us; 0.800x (0.75 .. 1.25)\n\n## Rows" in text
    assert f"{listed}None.\n" in page(record("ours"), record("theirs", ratio=1.1), part)


def test_versions() -> None:
    new, old = ABOUT | {"versions": {"torch": "2", "vllm": "1"}}, ABOUT | {"versions": {"torch": "2"}}
    rows = {
        name: {"about": about, "records": [record("ours")]} for name, about in zip("abc", (new, new, old), strict=True)
    }
    text = rows_page.page(rows, {})
    assert "| torch | 2 | all |" in text and "| openvino | not noted | all |" in text
    assert "| vllm | 1 | all others |\n| vllm | not noted | `c` |" in text
