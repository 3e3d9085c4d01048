"""What the calls of a program need besides their arguments: the step of a serving engine, say.

The side that compiles says it as data (`Noted`), and names a module. A replay imports that module, which makes of the
data what the calls find when they are run (`Restored`), as it imports a user's rules.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from npu_compiler.graph.effects import value
from npu_compiler.graph.functionalized import Wrapped
from npu_compiler.inspect.contents import Surroundings

Meanings = Mapping[Any, Callable[..., Any]]
Called = tuple[torch._ops.OpOverload, Mapping[str, Any]]
"""An operator, and what it is given to read, by name: fake values in place of tensors."""


class Noted(Protocol):
    """What a program's calls need, as data for a bundle."""

    module: str
    """What restores it: has a function `restored` that takes a `contents.Surroundings` and tensors."""

    def inputs(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Of a program's inputs, those that are neither tensors nor numbers, as text."""

    def about(self, inputs: Mapping[str, str]) -> dict[str, Any]:
        """What is known when the program is compiled."""

    def step(self, values: bool) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What is known when it is called; None while the call is none that is worth keeping.

        Args:
            values: whether the contents of memory are wanted too.
        """


class Run(Protocol):
    """The surroundings of one program that is called several times.

    Attributes:
        meanings: what operators do, where that is not what they are called for.
    """

    meanings: Meanings

    def turn(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Is entered around a call; memory has the values of this call then."""

    def left(self) -> dict[str, Tensor]:
        """What the last call has changed, by name, on the host."""


class Restored(Protocol):
    """What a program's calls need, made anew.

    Attributes:
        objects: values of inputs, by name.
    """

    objects: Mapping[str, Any]

    def fit(self, calls: Iterable[Called]) -> None:
        """Is told what the program calls, before it is run.

        Raises:
            BundleError: it needs what can't be restored.
        """

    def on_device(self) -> Run:
        """For the program on the device."""

    def in_float64(self) -> Run:
        """For the reference, on the host."""


class Nothing:
    """The surroundings of a program that needs none."""

    def __init__(self) -> None:
        self.objects: Mapping[str, Any] = {}
        self.meanings: Meanings = {}

    def fit(self, calls: Iterable[Called]) -> None:
        """Fits every program."""

    def on_device(self) -> Run:
        """Itself."""
        return self

    def in_float64(self) -> Run:
        """Itself."""
        return self

    def turn(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Nothing changes."""
        return contextlib.nullcontext()

    def left(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def restored(stored: Surroundings | None, tensors: Mapping[str, Tensor]) -> Restored:
    """The surroundings that a bundle holds. Imports the module that it names."""
    if stored is None:
        return Nothing()
    found: Restored = importlib.import_module(stored.module).restored(stored, tensors)
    return found


def calls_of(graph: fx.Graph) -> Iterator[Called]:
    """The operators that a program calls, those inside of AOTAutograd's functional wrappers included."""

    def given(item: Any) -> Any:
        return value(item) if isinstance(item, fx.Node) else item

    for node in graph.nodes:
        wrapped = Wrapped.of(node)
        if wrapped is not None:
            yield wrapped.operator, {name: given(item) for name, item in wrapped.reads.items()}
        elif isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            yield node.target, {name: given(item) for name, item in named.items()}
