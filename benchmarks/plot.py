"""The stored rows as a picture: every contestant's time over that of its row's subject, with the range."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[dict[str, Any]], file: Path) -> str | None:
    """Writes a PNG with one panel per measured row; returns why there is none, or None.

    `rows` are the stored JSON objects. Bars are medians on a logarithmic axis, whiskers the least and largest ratio.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; `make bench` installs it (pip install -e .[bench])"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [row for row in rows if any(record["ratio"] is not None for record in row["records"])]
    if not panels:
        return "no plot: no row has a ratio"
    heights = [len(compared(row)) + 2 for row in panels]
    figure = Figure(figsize=(9, 0.28 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, panel in zip(panels, axes, strict=True):
        draw_row(row, panel)
    axes[-1].set_xlabel("time / time of the first contestant (right of the line: the first one is faster)")
    figure.savefig(file, dpi=110)
    return None


def compared(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with a ratio, without the subject's own."""
    return [r for r in row["records"] if r["ratio"] is not None and r["peer"] != r["subject"]]


def draw_row(row: dict[str, Any], panel: Any) -> None:
    records = compared(row)
    ratios = [record["ratio"] for record in records]
    below = [record["ratio"] - record["ratio_min"] for record in records]
    above = [record["ratio_max"] - record["ratio"] for record in records]
    colours = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    panel.barh(range(len(records)), ratios, xerr=(below, above), color=colours, ecolor="0.4", capsize=2)
    panel.set_yticks(range(len(records)), [record["peer"] for record in records], fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.axvline(1.0, color="black", linewidth=0.8)
    missing = ", ".join(record["peer"] for record in row["records"] if record["missing"])
    notes = [f"missing: {missing}"] * bool(missing) + ["few undisturbed rounds"] * bool(row["records"][0]["noisy"])
    panel.set_title("; ".join([row["about"]["title"], *notes]), fontsize=8, loc="left")
