"""A program made smaller while it keeps failing, and the test file that is left.

What is shrunk is the program in front of the step that `bisect` found: the calls round the match first, in rings, until
the failure is there; then calls are cut out by halves (what they gave becomes an input of the program), then results,
then sizes. Each candidate is run. Streams, aliases and writes stay, because the failure has to: views of one storage
become inputs that share memory, and a call that writes is kept as long as the failure needs it.

torch's own minifier (torch._functorch.fx_minifier) is not used: it keeps values of inputs as they are behind the run,
so that a write in place is lost, makes inputs that shared memory separate, and knows no symbolic sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from npu_compiler.inspect.program import Argument, Call, Items, Program, Result, SizeValue, TensorValue

Holds = Callable[[Program], bool]
Say = Callable[[str], None]
SMALL = (2, 4, 8, 16, 32)
"""Sizes that are tried in the place of larger ones."""
MOST_SIZE_TRIALS = 32


def shrink(program: Program, holds: Holds, near: Iterable[str] = (), say: Say = lambda text: None) -> Program:
    """The smallest program found for which `holds`.

    Args:
        holds: whether a program still fails in the same way; it does for `program`.
        near: names of calls at which the failure is.
    """
    parts = _Parts(program)
    kept = _round(parts, holds, set(near)) or set(parts.names)
    say(f"{len(kept)} calls round the match")
    needed = _halved(sorted(kept, key=parts.position), lambda chosen: _try(parts, chosen, (), holds))
    program = parts.part(needed, ())
    say(f"{len(needed)} calls left")
    program = _fewer_results(program, holds)
    program = _smaller(_with_numbers(program, holds), holds)
    say(f"{sum(call.op == 'call_function' for call in program.calls)} calls and {len(program.inputs)} inputs left")
    return program


class _Parts:
    """A program that calls can be taken out of. A call with several results goes with what takes them apart."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._calls = {call.name: call for call in program.calls}
        self._index = {call.name: index for index, call in enumerate(program.calls)}
        self._whole: dict[str, str] = {}
        for call in program.calls:
            source = call.args[0] if call.args else None
            if call.target == "operator.getitem" and isinstance(source, Result):
                self._whole[call.name] = self._whole.get(source.name, source.name)
        self._users: dict[str, list[str]] = {}
        for call in program.calls:
            for name in call.inputs():
                self._users.setdefault(name, []).append(call.name)
        self.names = [
            call.name for call in program.calls if call.op == "call_function" and call.name not in self._whole
        ]

    def position(self, name: str) -> int:
        return self._index[name]

    def unit(self, name: str) -> str:
        """The call that `name` is a part of."""
        return self._whole.get(name, name)

    def neighbours(self, names: set[str]) -> set[str]:
        """Calls that make what these read, or read what they make."""
        found: set[str] = set()
        for name in names:
            for member in self._members(name):
                found.update(
                    self.unit(other) for other in (*self._calls[member].inputs(), *self._users.get(member, ()))
                )
        return (found & set(self.names)) - names

    def _members(self, name: str) -> list[str]:
        return [name, *(part for part, whole in self._whole.items() if whole == name)]

    def part(self, kept: Iterable[str], dropped: Sequence[str]) -> Program:
        """The program of these calls alone: what they read is an input, what others read of them is a result.

        Args:
            dropped: results to leave out.
        """
        inside = {member for name in kept for member in self._members(name)}
        read = {name for member in inside for name in self._calls[member].inputs()} - inside
        constants = {name for name in read if self._calls[name].op == "get_attr"}
        inputs = [self._as_input(self._calls[name]) for name in sorted(read - constants, key=self.position)]
        calls = [call for call in self._program.calls if call.name in inside | constants]
        results = [call.name for call in calls if call.name in inside and self._is_result(call, inside)]
        results = [name for name in results if name not in dropped]
        returned = Items(kind="tuple", items=tuple(Result(name=name) for name in results))
        output = Call(name="output", op="output", target="output", args=(returned,))
        return self._program.model_copy(update={"calls": (*inputs, *calls, output)})

    def _is_result(self, call: Call, inside: set[str]) -> bool:
        """Whether somebody outside reads it; a call with several results is taken apart first."""
        several = any(self._whole.get(user) == self.unit(call.name) for user in self._users.get(call.name, ()))
        users = self._users.get(call.name, ())
        return bool(call.values) and not several and (not inside.issuperset(users) or (not users and not call.writes))

    def _as_input(self, call: Call) -> Call:
        if call.op == "placeholder":
            return call
        return Call(name=call.name, op="placeholder", target=call.name, values=call.values[:1], place=call.place)


def _try(parts: _Parts, kept: Sequence[str], dropped: Sequence[str], holds: Holds) -> bool:
    if not kept:
        return False
    candidate = parts.part(kept, dropped)
    returns = bool(candidate.calls[-1].inputs())
    return (returns or any(call.writes for call in candidate.calls)) and holds(candidate)


def _round(parts: _Parts, holds: Holds, near: set[str]) -> set[str] | None:
    """The match and what is round it, ring by ring, until the failure is there; None where all is needed."""
    kept = {parts.unit(name) for name in near} & set(parts.names)
    while kept:
        if _try(parts, sorted(kept, key=parts.position), (), holds):
            return kept
        more = parts.neighbours(kept)
        if not more:
            return None
        kept |= more
        if len(kept) > len(parts.names) // 2:
            return None
    return None


def _halved(items: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Delta debugging: leaves out pieces, from halves to single ones, as long as it holds."""
    size = max(len(items) // 2, 1)
    while items:
        start, removed = 0, False
        while start < len(items):
            rest = items[:start] + items[start + size :]
            if rest and holds(rest):
                items, removed = rest, True
            else:
                start += size
        if size == 1 and not removed:
            return items
        size = max(size // 2, 1) if not removed or size > 1 else 1
    return items


def _fewer_results(program: Program, holds: Holds) -> Program:
    results = program.calls[-1].inputs()
    for name in list(results):
        rest = [other for other in results if other != name]
        candidate = _returning(program, rest)
        if (rest or any(call.writes for call in program.calls)) and holds(candidate):
            program, results = candidate, rest
    return program


def _returning(program: Program, names: Sequence[str]) -> Program:
    items = Items(kind="tuple", items=tuple(Result(name=name) for name in names))
    return program.model_copy(
        update={"calls": (*program.calls[:-1], program.calls[-1].model_copy(update={"args": (items,)}))}
    )


def _with_numbers(program: Program, holds: Holds) -> Program:
    """The program with every symbol replaced by the size that it had, where that fails too."""
    if not program.sizes:
        return program
    from npu_compiler.inspect.values import known_sizes

    candidate = known_sizes(program)
    return candidate if holds(candidate) else program


def _smaller(program: Program, holds: Holds) -> Program:
    """Smaller sizes, the largest first, wherever the failure allows."""
    left = MOST_SIZE_TRIALS
    done: set[int] = set()
    while left and _sizes(program) - done:
        old = max(_sizes(program) - done)
        done.add(old)
        ways = [(new, multiples) for new in SMALL if new < old for multiples in (True, False)]
        for new, multiples in ways[:left]:
            left -= 1
            candidate = _resized(program, old, new, multiples)
            if candidate is not None and holds(candidate):
                program = candidate
                break
    return program


def _sizes(program: Program) -> set[int]:
    tensors = [value for call in program.inputs for value in call.values if isinstance(value, TensorValue)]
    return {size for value in tensors for size in value.shape if isinstance(size, int) and size > SMALL[0]}


def _resized(program: Program, old: int, new: int, multiples: bool) -> Program | None:
    """The program with a size replaced wherever it stands; with its multiples in the same proportion."""

    def size(number: Any) -> Any:
        if type(number) is not int or number < old:
            return number
        if number == old or (multiples and number % old == 0):
            return number // old * new
        return number

    def argument(given: Argument) -> Argument:
        if isinstance(given, Items):
            return given.model_copy(update={"items": tuple(map(argument, given.items))})
        return size(given)  # type: ignore[no-any-return]

    calls = []
    for call in program.calls:
        if call.op == "placeholder":
            values = tuple(_resized_value(value, size) for value in call.values)
            if None in values:
                return None
            calls.append(call.model_copy(update={"values": values}))
        elif call.op == "get_attr":
            calls.append(call)
        else:
            kwargs = {name: argument(given) for name, given in call.kwargs.items()}
            calls.append(call.model_copy(update={"args": tuple(map(argument, call.args)), "kwargs": kwargs}))
    return _described(program.model_copy(update={"calls": tuple(calls)}))


def _resized_value(value: TensorValue | SizeValue, size: Callable[[Any], Any]) -> TensorValue | SizeValue | None:
    """The value with other sizes, its elements as dense and in the order they were; None where they had gaps."""
    if isinstance(value, SizeValue):
        return value.model_copy(update={"size": size(value.size)})
    shape = tuple(map(size, value.shape))
    if not all(isinstance(item, int) for item in (*shape, *value.stride, value.offset)):
        return value
    order = sorted(range(len(shape)), key=lambda index: (value.stride[index], -index))
    step, old_step, stride = 1, 1, [0] * len(shape)
    for index in order:
        if value.stride[index] != old_step and value.shape[index] != 1:
            return value if shape == value.shape else None
        stride[index] = step
        step *= shape[index]
        old_step *= int(value.shape[index])
    if value.offset and shape != value.shape:
        return None
    return value.model_copy(update={"shape": shape, "stride": tuple(stride)})


def _described(program: Program) -> Program | None:
    """The program with the values that its calls now give; None where they can't be called so."""
    from npu_compiler.inspect.from_graph import program_of
    from npu_compiler.inspect.replay import FAILURES
    from npu_compiler.inspect.to_graph import graph_of

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it reports each call that does not fit
    try:
        return program_of(graph_of(program).graph).model_copy(
            update={"made_up": program.made_up, "groups": program.groups}
        )
    except FAILURES:
        return None
    finally:
        log.setLevel(level)


def calls_in(program: Program) -> Iterator[Call]:
    """The calls that are made."""
    return (call for call in program.calls if call.op == "call_function")
