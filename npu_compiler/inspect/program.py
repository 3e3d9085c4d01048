"""A program as plain data: what a bundle holds of each stage.

Names, numbers and texts only, each of a checked form: a bundle from a stranger can be looked at without running
anything that is in it. `from_graph.py` makes this data of a graph, `to_graph.py` a graph of this data, and
`python_text.py` a Python program. Reading it does not take torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from npu_compiler.graph.source import Place
from npu_compiler.inspect.names import Device, Dotted, Keyword, Name, SizeText, TorchName, is_constant


class Data(BaseModel):
    """Base of all data of a bundle: immutable, and nothing but what is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(Data):
    """The result of a call, in place of an argument."""

    name: Name


class Named(Data):
    """A constant that JSON has no form for, by its name in torch: a dtype, a device, an operator, an infinite float.

    `other` is anything else, of which only the text is kept: a program with one can be read but not run.
    """

    kind: Literal["dtype", "device", "layout", "memory_format", "operator", "float", "size", "other"]
    text: str

    @model_validator(mode="after")
    def _check(self) -> Named:
        if not is_constant(self.kind, self.text):
            raise ValueError(f"{self.text[:80]!r} is no {self.kind}")
        return self


class Items(Data):
    """A tuple, list or slice, or the values of a mapping, whose `keys` are then given."""

    kind: Literal["tuple", "list", "slice", "mapping"]
    items: tuple[Argument, ...]
    keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Items:
        wanted = {"slice": 3}.get(self.kind, len(self.items))
        if len(self.items) != wanted or len(self.keys) != (len(self.items) if self.kind == "mapping" else 0):
            raise ValueError(f"a {self.kind} of {len(self.items)} items and {len(self.keys)} keys")
        return self


Argument = None | bool | int | float | str | Result | Named | Items
Items.model_rebuild()
Size = int | SizeText


class TensorValue(Data):
    """A tensor's metadata. Sizes are numbers, or Python expressions of the program's symbols.

    Attributes:
        storage: equal for tensors that share memory.
    """

    dtype: TorchName
    device: Device
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size = 0
    storage: int

    def __str__(self) -> str:
        return f"{self.dtype.removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class SizeValue(Data):
    """A number that is known when the program is called: a Python expression of its symbols.

    Attributes:
        kind: the type that it has in Python.
    """

    size: Size
    kind: Literal["int", "float", "bool"] = "int"

    def __str__(self) -> str:
        return str(self.size)


class Cost(Data):
    """What a call is estimated to cost on a card, at the sizes of the call that was compiled (plan/estimate.py).

    Attributes:
        engine: the part of the device that it keeps busy. `bytes`: read and written.
    """

    engine: Literal["matrix", "vector", "copy", "link"]
    bytes: int
    microseconds: float


class Call(Data):
    """One node.

    Attributes:
        op: as in FX: placeholder, get_attr, call_function, output.
        target: the operator's name with its overload, or the name of an input or constant.
        values: what it yields: one entry for each tensor or number.
        place: where it comes from in the user's model.
        made_by, replaces: the pass that made it, and the lowered program's nodes that it stands for.
        writes: storages that it writes.
        once: whether it is computed at the first call only.
        lasting: of an input, whether it lies at the same address at every call.
        layers: how many equal layers of the model it stands for.
        cost: None for what launches nothing, and in bundles that were written before there was an estimate.
        stream, waits: where a capture has it run (0 is the main stream), and the calls of other streams that it waits
            for; in no file of a bundle (inspect/streams.py).
    """

    name: Name
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: Dotted
    args: tuple[Argument, ...] = ()
    kwargs: dict[Keyword, Argument] = {}
    values: tuple[TensorValue | SizeValue, ...] = ()
    place: Place = Place()
    made_by: str = ""
    replaces: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()
    once: bool = False
    lasting: bool = False
    layers: int = 1
    cost: Cost | None = None
    stream: int = 0
    waits: tuple[str, ...] = ()

    def inputs(self) -> list[str]:
        """Names of the calls whose results it reads, in order, each once."""
        return list(dict.fromkeys(_names_in((self.args, tuple(self.kwargs.values())))))


class Program(Data):
    """A graph at one stage.

    Attributes:
        sizes: the value of each symbol in the call that was compiled; for a run with made-up inputs.
        assumptions: what was known of the symbols when the program was written down, as Python expressions.
        made_up: constants whose values are not kept (large ones); their layout is.
        groups: the process's number in each group that its calls name, and how many ranks that has.
    """

    calls: tuple[Call, ...]
    sizes: dict[Name, int] = {}
    assumptions: tuple[SizeText, ...] = ()
    made_up: tuple[str, ...] = ()
    groups: dict[str, tuple[int, int]] = {}

    @model_validator(mode="after")
    def _check(self) -> Program:
        known: set[str] = set()
        for call in self.calls:
            unknown = [name for name in call.inputs() if name not in known]
            if unknown:
                raise ValueError(f"{call.name} reads {unknown[0]}, which no call before it makes")
            if call.name in known:
                raise ValueError(f"two calls are named {call.name}")
            known.add(call.name)
        if not self.calls or [call.op for call in self.calls].count("output") != 1 or self.calls[-1].op != "output":
            raise ValueError("a program ends with its only output")
        if len(self.calls[-1].args) != 1:
            raise ValueError("an output has one argument")
        if any(call.op == "placeholder" and len(call.values) > 1 for call in self.calls):
            raise ValueError("an input has one value")
        return self

    @property
    def inputs(self) -> tuple[Call, ...]:
        """The inputs in order."""
        return tuple(call for call in self.calls if call.op == "placeholder")

    @property
    def constants(self) -> tuple[Call, ...]:
        """The reads of constants."""
        return tuple(call for call in self.calls if call.op == "get_attr")


def _names_in(argument: Any) -> list[str]:
    if isinstance(argument, Result):
        return [argument.name]
    if isinstance(argument, (tuple, list)):
        return [name for item in argument for name in _names_in(item)]
    return _names_in(argument.items) if isinstance(argument, Items) else []
