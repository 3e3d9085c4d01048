"""Thousands of random graphs: each equals itself behind every prefix of the pipeline and with a pass left out.

Every run tries the same programs; `NPU_COMPILER_SEED=N` tries others. A failure prints the program as a value, which
goes into FOUND in test_found.py, the seed, and hypothesis's @reproduce_failure line.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import note
from torch import fx

from tests.properties.compare import Lowered
from tests.properties.decode import Drawn, decode, drawn
from tests.properties.fragments import expected_to_fire, fragments
from tests.properties.graphs import Graph, Taken, build, example, template
from tests.properties.programs import alone
from tests.properties.seeded import try_all
from tests.properties.stages import Stages, check_all

PARTS, STEPS, ENDS = 4, 250, 2
"""In how many tests how many lists of steps are tried, each with how many ends: 2,000 graphs."""
MANY = 20
"""How many times as many the long matrix tries."""
CHECKED, PLANNED = 3, 6
"""One program in so many runs under the spec check, and is planned for several streams: these cost most."""
FIRED: Counter[str] = Counter()
"""How often each rule or pass fired in this file's tests so far."""
CHANGED: Counter[str] = Counter()
LEFT_OUT: Counter[str] = Counter()
"""How many programs each pass changed, and how many were compared without it."""


@pytest.fixture(autouse=True, scope="module")
def few_collections() -> Iterator[None]:
    """A program is many small objects that live as long as it is looked at."""
    threshold = gc.get_threshold()
    gc.set_threshold(100_000, *threshold[1:])
    yield
    gc.set_threshold(*threshold)


@dataclass(frozen=True)
class Code:
    """A program's text, made when it is printed."""

    module: fx.GraphModule

    def __repr__(self) -> str:
        return self.module.code


def check(numbers: Drawn) -> None:
    """The programs of some numbers, at all stages."""
    for place, built in enumerate(decode(numbers)):
        note(built.program)
        note(Code(built.module))
        number = numbers.disabled + place
        stages = check_all(built, number, plan=number % PLANNED == 0, check=number % CHECKED == 0)
        FIRED.update(stages.fired)
        CHANGED.update(stages.changed.keys())
        LEFT_OUT.update(stages.left_out)


@pytest.mark.parametrize("part", range(PARTS))
def test_programs(part: int) -> None:
    try_all(check, drawn(most_steps=10, ends=ENDS), STEPS, part)


@pytest.mark.parametrize("name", [name for name, one in fragments().items() if not one.miss])
def test_each_rule_alone(name: str) -> None:
    """Without every single pass that changes it."""
    for place, dtype in enumerate(fragments()[name].dtypes):
        count = len(example(name, dtype))
        steps = (*(Taken(name, place) for place in range(count)), (name, tuple(range(count))))
        results = tuple(range(count, count + fragments()[name].results))
        with torch.no_grad():
            stages = Stages(build(Graph(steps, results, dtype=dtype, dynamic=place > 0)))
            stages.prefixes(check=True)
            for entry in stages.changed:
                stages.without(entry)
        FIRED.update(stages.fired)
        CHANGED.update(stages.changed.keys())
        LEFT_OUT.update(stages.left_out)


@pytest.mark.full
@pytest.mark.parametrize("name", fragments())
def test_templates_are_what_lowering_makes(name: str) -> None:
    """The calls of each fragment, sizes apart, which lowering makes inputs."""
    for dtype in fragments()[name].dtypes:
        with torch.no_grad():
            lowered = Lowered(alone(name, dtype), dynamic=True).functional.graph
            assert operators(template(name, dtype)) == operators(lowered), dtype


def operators(graph: fx.Graph) -> list[str]:
    """Each call with its arguments: sizes as expressions, other values by number, the tensors given first."""
    made: dict[fx.Node, str] = {}
    found, values = [], 0
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            made[node] = str(node.meta["val"])
        elif node.op in ("placeholder", "call_function"):
            if node.op == "call_function":
                found.append(f"{node.target}{fx.node.map_arg((node.args, node.kwargs), made.__getitem__)}")
            made[node] = f"value {values}"
            values += 1
    return found


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(PARTS, PARTS * (1 + MANY)))
def test_many_programs(part: int) -> None:
    try_all(check, drawn(most_steps=16, ends=ENDS), STEPS, part)


def test_every_rule_fired() -> None:
    """In the programs above; what never fires was never compared."""
    if not FIRED:
        pytest.skip("the tests above did not run")
    missing = expected_to_fire() - FIRED.keys()
    assert not missing, f"never fired: {sorted(missing)}; fired: {FIRED}"


def test_every_pass_was_left_out() -> None:
    """Every pass that changed a program was left out of one that it changes."""
    if not LEFT_OUT:
        pytest.skip("the tests above did not run")
    missing = CHANGED.keys() - LEFT_OUT.keys()
    assert not missing, f"never left out: {sorted(missing)}; left out: {LEFT_OUT}; changed: {CHANGED}"
