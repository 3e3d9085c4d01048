"""Amounts as people read them."""

from __future__ import annotations

from typing import SupportsInt

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def in_bytes(count: SupportsInt | str) -> str:
    """A number of bytes in the unit that suits it: `128 KiB`; one that depends on sizes as it is: `512*s0 bytes`."""
    try:
        size: float = int(count)
    except (TypeError, ValueError):  # an expression
        return f"{count} bytes"
    unit = 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.{int(unit > 0 and abs(size) < 100)}f} {UNITS[unit]}"
