"""What is the same in every layer of a model, told once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_LAYER = re.compile(r"(?P<before>(?:[A-Za-z_]\w*\.)*)(?P<layer>\d+)(?P<behind>(?:\.[\w.-]+)?(?: at .*)?)$", re.DOTALL)


@dataclass
class _Group:
    """What is equal but for the layer: how often it is, in which layers, and how many layers each stands for."""

    place: str
    count: int = 0
    layers: dict[int, int] = field(default_factory=dict)


def grouped(entries: Iterable[tuple[str, int]]) -> Iterator[tuple[str, str]]:
    """Places that differ in the layer alone, as one: how often (` x28, layers 0-27`), and the place with a `*`.

    Args:
        entries: each a place, and in how many equal layers it is, of which it names the first.
    """
    groups: dict[object, _Group] = {}
    for place, times in entries:
        found = _LAYER.match(place)
        known = groups.setdefault(found.group("before", "behind") if found else place, _Group(place))
        known.count += times
        if found:
            layer = int(found["layer"])
            known.layers[layer] = max(times, known.layers.get(layer, 0))
    for group in groups.values():
        yield _said(group)


def _said(group: _Group) -> tuple[str, str]:
    often = f" x{group.count}" if group.count > 1 else ""
    found = _LAYER.match(group.place)
    if found is None or (len(group.layers) == 1 and max(group.layers.values()) == 1):
        return often, group.place
    before, _, behind = found.groups()
    of = before.rstrip(".").rpartition(".")[2] or "modules"
    return f"{often}, {of} {_ranges(group.layers)}", f"{before}*{behind}"


def _ranges(layers: dict[int, int]) -> str:
    """Numbers of layers as text. One that stands for several is followed by those that are left out, so the numbers of
    the later ones are those of a shorter model."""
    found: list[tuple[int, int]] = []
    left_out = 0
    for layer, times in sorted(layers.items()):
        first, last = layer + left_out, layer + left_out + times - 1
        left_out += times - 1
        if found and found[-1][1] + 1 == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found)
