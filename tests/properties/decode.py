"""Random programs from numbers: what hypothesis draws, and how it becomes a program whose every step is valid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.properties.draws import integers, one_of
from tests.properties.fragments import HALVES, Fragment, fragments
from tests.properties.graph_steps import COMPUTE, NOTHING, STEPS, VIEW
from tests.properties.graph_writes import WRITE
from tests.properties.graphs import COLUMNS, LAYOUTS, PARTS, Built, Draft, Overlap, Own, Taken, example

Code = tuple[int, int, int, int, int]
"""A step as numbers: its table, its place there, and its operands."""
End = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""How a program ends, as numbers: the values that it returns, and the inputs that it writes with values."""
INPUT, FRAGMENT, MISS = "input", "fragment", "near miss"
WEIGHTS = (
    NOTHING,
    NOTHING,
    COMPUTE,
    COMPUTE,
    COMPUTE,
    VIEW,
    VIEW,
    WRITE,
    WRITE,
    WRITE,
    INPUT,
    INPUT,
    FRAGMENT,
    FRAGMENT,
    MISS,
)
NUMBERS = integers(0, 255)
DTYPES = (torch.float32,) * 12 + HALVES


@dataclass(frozen=True)
class Drawn:
    """Programs as numbers: one for each end. Any numbers are a program, and so is any part of the lists.

    Attributes:
        disabled: picks, among the passes that change the program, the one to leave out.
    """

    codes: tuple[Code, ...]
    ends: tuple[End, ...]
    dtype: torch.dtype
    dynamic: bool
    disabled: int


def drawn(most_steps: int, dtypes: Sequence[torch.dtype] = DTYPES, ends: int = 1) -> st.SearchStrategy[Drawn]:
    """Numbers for programs of up to `most_steps` steps; those in half precision run on the device."""
    end = st.tuples(
        st.lists(NUMBERS, max_size=3).map(tuple), st.lists(st.tuples(NUMBERS, NUMBERS), max_size=2).map(tuple)
    )
    codes = st.tuples(integers(0, len(WEIGHTS) - 1), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
    return st.builds(
        Drawn,
        codes=st.lists(codes, min_size=2, max_size=most_steps).map(tuple),
        ends=st.lists(end, min_size=ends, max_size=ends).map(tuple),
        dtype=one_of(dtypes),
        dynamic=st.booleans(),
        disabled=NUMBERS,
    )


def decode(numbers: Drawn) -> list[Built]:
    """The programs of some numbers. The first one returns the last value; all have the same steps."""
    draft = Draft(numbers.dtype, numbers.dynamic)
    draft.add(Own(4))
    for code in numbers.codes:
        _decode(draft, *code)
    last = len(draft.values) - 1
    given = [index for index, node in enumerate(draft.values) if node.op == "placeholder"]
    found = []
    for place, (outputs, writes) in enumerate(numbers.ends):
        returned = [] if place else [last]
        returned += [_late(draft, index) for index in outputs]
        found.append(
            draft.finish(returned, [(given[target % len(given)], _late(draft, source)) for target, source in writes])
        )
    return found


def _decode(draft: Draft, table: int, place: int, *operands: int) -> None:
    kind = WEIGHTS[table]
    if kind == INPUT:
        draft.add(_input(draft, place, operands[0]))
    elif kind in (FRAGMENT, MISS):
        names = _fragment_names(draft.dtype, kind == MISS)
        _add_fragment(draft, fragments()[names[place % len(names)]], operands)
    else:
        assert isinstance(kind, dict)
        _add_step(draft, list(kind), place, operands)


def _input(draft: Draft, place: int, number: int) -> Own | Overlap:
    matrices = [
        index for index, entry in enumerate(draft.inputs) if isinstance(entry, Own) and entry.columns == COLUMNS
    ]
    if place % 8 == 7:
        return Overlap(matrices[number % len(matrices)], list(PARTS)[(place // 8) % len(PARTS)])
    columns = 6 if place % 8 == 6 else COLUMNS
    return Own(2 + number % 4, columns, LAYOUTS[(place // 8) % len(LAYOUTS)])


def _late(draft: Draft, number: int) -> int:
    """The index of a value; later ones are drawn more often: programs are chains, not bushes."""
    count = len(draft.values)
    return count - 1 - (number * number * count >> 16)


def _add_step(draft: Draft, names: Sequence[str], place: int, operands: Sequence[int]) -> None:
    """The first step from `place` on that takes the first operand; the others are of its kind."""
    first = _late(draft, operands[0])
    kind = draft.kinds[first]
    turned = [*names[place % len(names) :], *names[: place % len(names)]]
    name = next((name for name in turned if STEPS[name].takes(kind)), "clone")
    like = [index for index, other in enumerate(draft.kinds) if other.key == kind.key]
    takes = [index for index in like if STEPS[name].takes(draft.kinds[index])]
    chosen = [first]
    for place in range(1, STEPS[name].operands):
        fits = takes if place < STEPS[name].written else like
        chosen.append(fits[-1 - operands[place] % len(fits)])
    _add(draft, name, tuple(chosen))


def _add_fragment(draft: Draft, fragment: Fragment, operands: Sequence[int]) -> None:
    """Each argument is a value of its kind that is there already, or a new input: fragments form chains."""
    number = operands[0] << 16 | operands[1] << 8 | operands[2]
    chosen = []
    for place in range(len(example(fragment.name, draft.dtype))):
        entry = Taken(fragment.name, place)
        fits = [index for index, kind in enumerate(draft.kinds) if kind.key == _key(draft, entry)]
        number, choice = divmod(number, 8)
        if choice % 4 == 0 or not fits:
            draft.add(entry)
            chosen.append(len(draft.values) - 1)
        else:
            chosen.append(fits[-1 - choice % len(fits)])
    _add(draft, fragment.name, tuple(chosen))


def _add(draft: Draft, name: str, operands: tuple[int, ...]) -> None:
    try:
        draft.add((name, operands))
    except RuntimeError:
        draft.add(("clone", operands[:1]))


def _key(draft: Draft, entry: Taken) -> tuple[str, ...]:
    like = example(entry.fragment, draft.dtype)[entry.place]
    sizes = [
        draft.length(size) if grows else str(size)
        for size, grows in zip(like.shape, entry.grows(draft.dtype), strict=True)
    ]
    return str(like.dtype), *sizes


@functools.cache
def _fragment_names(dtype: torch.dtype, miss: bool) -> tuple[str, ...]:
    """Those that only half precision has are drawn more often: few programs have it."""
    names = sorted(name for name, one in fragments().items() if dtype in one.dtypes and one.miss == miss)
    rare = [name for name in names if torch.float32 not in fragments()[name].dtypes]
    return *names, *rare * 3
