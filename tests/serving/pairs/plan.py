"""Which pairs there are, and which starts of an engine try those that have no result yet."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tests.serving.pairs.features import BY_NAME, FEATURES, KINDS, Feature

RANKS_DEFAULT = BY_NAME["tensor_parallel=2"]


@dataclasses.dataclass(frozen=True)
class Start:
    """An engine's settings: features that are on together, for a kind of model."""

    kind: str
    names: frozenset[str]

    @classmethod
    def of(cls, kind: str, features: Iterable[Feature]) -> Start:
        """A start with these features and what they need."""
        chosen = set(features)
        axes = {feature.axis for feature in chosen}
        if any(feature.needs and axes.isdisjoint(feature.needs) for feature in chosen):
            chosen.add(RANKS_DEFAULT)
        return cls(kind, frozenset(feature.name for feature in chosen))

    @classmethod
    def parse(cls, text: str) -> Start:
        """The start with this name (`str`)."""
        kind, _, names = text.partition(":")
        return cls(kind, frozenset(names.split("+")))

    def __str__(self) -> str:
        return f"{self.kind}:{'+'.join(feature.name for feature in self.features)}"

    @property
    def features(self) -> list[Feature]:
        """In the order of the table."""
        return [feature for feature in FEATURES if feature.name in self.names]

    @property
    def ranks(self) -> int:
        """How many processes run the model."""
        count = 1
        for feature in self.features:
            count *= feature.ranks
        return count

    @property
    def layers(self) -> int:
        """How many the model has."""
        return max(feature.layers for feature in self.features)

    @property
    def dtype(self) -> str:
        """float32 compares most sharply; some features work on half precision only."""
        return "float16" if any(feature.half for feature in self.features) else "float32"

    def settings(self) -> dict[str, Any]:
        """Arguments of the engine."""
        found: dict[str, Any] = {"dtype": self.dtype}
        options: dict[str, Any] = {}
        plugin: dict[str, Any] = {}
        for feature in self.features:
            found |= feature.settings
            options |= feature.compile
            plugin |= feature.plugin(self.ranks)
        if self.ranks > 1 and "data_parallel_size" not in found:
            found["distributed_executor_backend"] = "mp"
        plugin |= {"compile": options} if options else {}
        return found | ({"additional_config": plugin} if plugin else {})


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
    """Two features beside each other in a kind of model, by name, in the order of the table."""

    kind: str
    left: str
    right: str

    @property
    def start(self) -> Start:
        """The pair alone."""
        return Start.of(self.kind, (BY_NAME[self.left], BY_NAME[self.right]))


def pairs() -> list[Pair]:
    """All that mean anything: two choices of one axis don't, nor does a feature of experts for a dense model."""
    found = []
    for kind, (left, right) in itertools.product(KINDS, itertools.combinations(FEATURES, 2)):
        meant = kind in left.kinds and kind in right.kinds
        other = not left.axis or left.axis != right.axis
        tried = all(not one.only_with or two.name in one.only_with for one, two in ((left, right), (right, left)))
        if meant and other and tried:
            found.append(Pair(kind, left.name, right.name))
    return found


def refusal(start: Start) -> str:
    """A part of the message with which start-up has to refuse these settings; empty where they are legal."""
    for one in start.features:
        for name, message in one.refused_with.items():
            kind, _, other = name.rpartition(":")
            if other in start.names and kind in ("", start.kind):
                return message
    return ""


def pairs_of(start: Start) -> set[Pair]:
    """The pairs that a start tries."""
    return {pair for pair in pairs() if pair.kind == start.kind and {pair.left, pair.right} <= start.names}


def covering(wanted: Sequence[Pair]) -> Iterator[Start]:
    """Few starts that try all of the legal pairs `wanted`: each holds as many as go together on no more ranks than its
    first pair needs, since a rank is a process that takes half a minute to start."""
    left = {pair: None for pair in wanted if not refusal(pair.start)}
    while left:
        first = next(iter(left))
        start = first.start
        most = max(start.ranks, 2)
        for feature in _by_need(left, first.kind):
            larger = Start.of(start.kind, (*start.features, feature))
            if _goes(larger, most) and len(pairs_of(larger) & set(left)) > len(pairs_of(start) & set(left)):
                start = larger
        yield start
        for pair in pairs_of(start):
            left.pop(pair, None)


def _by_need(left: Iterable[Pair], kind: str) -> list[Feature]:
    """Features by the number of pairs that still need them, most first."""
    count = {
        feature.name: sum(feature.name in (pair.left, pair.right) for pair in left if pair.kind == kind)
        for feature in FEATURES
    }
    return sorted((feature for feature in FEATURES if count[feature.name]), key=lambda one: -count[one.name])


def _goes(start: Start, ranks: int) -> bool:
    """Whether all features of a start are meant to go together, on so many ranks at most."""
    axes = [feature.axis for feature in start.features if feature.axis]
    known = {pair for pair in pairs() if pair.kind == start.kind}
    alike = len(set(axes)) == len(axes) and start.ranks <= ranks and not refusal(start)
    order = [feature.name for feature in start.features]
    return alike and all(Pair(start.kind, *two) in known for two in itertools.combinations(order, 2))
