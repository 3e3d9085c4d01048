"""Which memory of a program lives from where to where.

What lives is a storage, not a value: views and results of writes in place are the storage they look at, and memory is
let go behind the last call that reads any of them. Storages of inputs and constants belong to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from npu_compiler.facts.sizes import expression
from npu_compiler.graph.effects import storage, tensors


@dataclass(frozen=True)
class Lifetime:
    """A storage that the program allocates.

    Attributes:
        name: the node that makes it; with .0, .1, ... where it makes several.
        bytes: its size, in the symbols of the program.
        first, last: positions in the order of nodes: where it is made and behind which it is let go.
        returned: it leaves the program, so it lives to the end.
    """

    name: str
    bytes: sympy.Expr
    first: int
    last: int
    returned: bool


class Storages:
    """The storages of a program: who makes them and who keeps them alive, whatever the order of calls.

    Args:
        nodes: the program, in any order that works.
        device: the device type whose memory counts.

    Attributes:
        made: for each node that allocates: the storages and their bytes.
        touched: for each node the storages that are alive until it has run.
    """

    def __init__(self, nodes: Sequence[fx.Node], device: str) -> None:
        self.made: dict[fx.Node, list[tuple[int, sympy.Expr]]] = {}
        self.touched: dict[fx.Node, set[int]] = {}
        self._keepers: dict[int, list[fx.Node]] = {}
        held: dict[fx.Node, set[int]] = {}
        foreign: set[int] = set()
        for node in nodes:
            held[node] = set()
            for tensor in tensors(node) if node.op != "output" else ():
                key = storage(tensor)
                held[node].add(key)
                if key in self._keepers or key in foreign:
                    continue
                if node.op == "call_function" and tensor.device.type == device:
                    self.made.setdefault(node, []).append((key, size_of(tensor)))
                    self._keepers[key] = []
                else:
                    foreign.add(key)
            self.touched[node] = held[node].union(*(held[source] for source in node.all_input_nodes)) - foreign
            for key in self.touched[node]:
                self._keepers[key].append(node)

    def keepers(self, key: int) -> list[fx.Node]:
        """The nodes that look at a storage: it is let go when all of them have run."""
        return self._keepers[key]

    def lifetimes(self, order: Sequence[fx.Node]) -> list[Lifetime]:
        """The storages when the program runs in `order`, by where they are made."""
        position = {node: index for index, node in enumerate(order)}
        found = []
        for node in sorted(self.made, key=position.__getitem__):
            made = self.made[node]
            for index, (key, size) in enumerate(made):
                keepers = self._keepers[key]
                found.append(
                    Lifetime(
                        name=f"{node.name}.{index}" if len(made) > 1 else node.name,
                        bytes=size,
                        first=position[node],
                        last=max(map(position.__getitem__, keepers)),
                        returned=keepers[-1].op == "output",
                    )
                )
        return found


def size_of(tensor: torch.Tensor) -> sympy.Expr:
    """Bytes of a tensor's storage."""
    return expression(tensor.untyped_storage().nbytes())
