"""What disturbed a row from its beginning to its end, which comparing it with itself doesn't show.

A row is stored with the share of the machine's cores that other programs had in its rounds, and with what its probe
took. The first says so by itself; the second is compared with the other rows of the same processor and release of
torch. So a neighbour is noticed that the machine sees, and one outside of a virtual machine that makes its cores
slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import cpu

Row = Mapping[str, Any]
"""A stored row, as benchmarks.stored reads it."""
PROBE_TOLERANCE = 1.3
"""More than so many times its best, the probe was disturbed."""


def noted(use: cpu.Use, probe: float) -> dict[str, float]:
    """What is stored, as `conditions` of each record: `others`, a share of the cores, and `probe_us`, microseconds."""
    return {"others": round(use.others, 3), "probe_us": round(1e6 * probe, 2)}


def of(row: Row) -> dict[str, float] | None:
    """The conditions of a row; None where none are noted: nothing was timed, or the row is older than they are."""
    found: dict[str, float] | None = row["records"][0].get("conditions")
    return found


def probe_ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """Times by which the probe of `row` was slower than that of the best of it and `rows`, as far as they compare."""
    if (own := of(row)) is None:
        return None
    alike = (of(other) for other in rows if _machine(other) == _machine(row))
    return own["probe_us"] / min([own["probe_us"], *(found["probe_us"] for found in alike if found)])


def disturbances(row: Row, rows: Iterable[Row]) -> list[str]:
    """A few words for each thing that disturbed all of `row`, one of `rows`; none where nothing is noted."""
    found = []
    if (own := of(row)) is not None and own["others"] > cpu.LOADED:
        found.append(f"other programs had {own['others']:.0%} of the cores")
    ratio = probe_ratio(row, rows)
    if ratio is not None and ratio > PROBE_TOLERANCE:
        found.append(f"the probe took {ratio:.2f} times what it took in another row")
    return found


def _machine(row: Row) -> tuple[Any, Any]:
    """What the time of the probe depends on."""
    about = row["about"]
    return about["machine"]["processor"], about["versions"]["torch"]
