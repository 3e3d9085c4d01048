"""Memory that becomes one while a program is rewritten."""

from __future__ import annotations

from torch import fx

from npu_compiler.graph.effects import storage, tensors


class Merged:
    """Identities of storages (effects.storage), where one may have taken the place of another."""

    def __init__(self) -> None:
        self._instead: dict[int, int] = {}

    def of(self, node: fx.Node) -> list[int]:
        """The memory of each tensor of a node."""
        return [self.now(storage(tensor)) for tensor in tensors(node)]

    def now(self, key: int) -> int:
        """What `key` has become."""
        passed = []
        while key in self._instead:
            passed.append(key)
            key = self._instead[key]
        for earlier in passed:  # the next look takes one step
            self._instead[earlier] = key
        return key

    def merge(self, gone: int, kept: int) -> None:
        """`kept` takes the place of `gone`; both as `now` gives them, and two."""
        self._instead[gone] = kept
