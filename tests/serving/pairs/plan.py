"""Which pairs there are, and which starts of an engine try those that have no result yet."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tests.serving.pairs.features import BY_NAME, FEATURES, KINDS, LAYERS, Feature

RANKS = {"tensor": BY_NAME["tensor_parallel=2"], "data": BY_NAME["data_parallel=2"]}
"""What is chosen of an axis that a feature needs."""


@dataclasses.dataclass(frozen=True)
class Start:
    """An engine's settings: features that are on together, for a kind of model."""

    kind: str
    names: frozenset[str]

    @classmethod
    def of(cls, kind: str, features: Iterable[Feature]) -> Start:
        """A start with these features and what they need."""
        chosen = set(features)
        for feature in list(chosen):
            if feature.behind and chosen.isdisjoint(BY_NAME[name] for name in feature.behind):
                chosen.add(BY_NAME[feature.behind[0]])
        for feature in sorted(chosen, key=lambda one: len(one.needs)):  # first those that have no choice
            if feature.needs and {one.axis for one in chosen}.isdisjoint(feature.needs):
                chosen.add(RANKS[feature.needs[0]])
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

    def has(self, name: str) -> bool:
        """Whether a feature is on, given as `NAME`, or as `KIND:NAME` for one kind of models only."""
        kind, _, feature = name.rpartition(":")
        return feature in self.names and kind in ("", self.kind)

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
        stages = math.prod(feature.ranks for feature in self.features if feature.axis == "pipeline")
        return max(LAYERS, stages * max(feature.layers for feature in self.features))

    @property
    def hidden(self) -> int:
        """How many columns the model has."""
        return max(feature.hidden for feature in self.features)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the ranks' processes."""
        return {name: value for feature in self.features for name, value in feature.environment.items()}

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
            plugin |= feature.plugin(self.ranks, self.layers)
        for feature in self.features:
            for name, values in feature.beside.items():
                options |= values if self.has(name) else {}
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


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """All that are tried. A model with a shared expert is for what works on that: the other mixture tries the rest."""
    found = []
    for kind, (left, right) in itertools.product(KINDS, itertools.combinations(FEATURES, 2)):
        alone = kind != "shared" or (kind,) in (left.kinds, right.kinds)
        if alone and _means_anything(kind, left, right):
            found.append(Pair(kind, left.name, right.name))
    return tuple(found)


def _means_anything(kind: str, left: Feature, right: Feature) -> bool:
    """Two choices of one axis don't, nor does a feature of experts for a dense model."""
    meant = kind in left.kinds and kind in right.kinds
    other = not left.axis or left.axis != right.axis
    tried = all(not one.only_with or two.name in one.only_with for one, two in ((left, right), (right, left)))
    return meant and other and tried


def refusal(start: Start) -> str:
    """A part of the message with which start-up has to refuse these settings; empty where they are legal."""
    for one in start.features:
        for name, message in one.refused_with.items():
            if start.has(name):
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
    two_by_two = itertools.combinations(start.features, 2)
    meant = all(_means_anything(start.kind, *two) for two in two_by_two)
    return meant and start.ranks <= ranks and not refusal(start)
