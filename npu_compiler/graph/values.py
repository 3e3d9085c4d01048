"""The fake values of calls that repeat other calls: the same layouts in memory of their own.

Inferring a value from a call's arguments takes about a hundred times as long as copying a known one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from npu_compiler.graph.effects import storage, tensors
from npu_compiler.graph.spec import infer


class Repeated:
    """Values for calls that are repeated with other arguments of the same layouts.

    Args:
        calls: the calls in their order; repetitions are appended to this list by the caller, `length` at a time.
        inputs: the inputs that differ from repetition to repetition.
    """

    def __init__(self, calls: Sequence[fx.Node], length: int, inputs: Sequence[fx.Node]) -> None:
        self._calls, self._length = calls, length
        self._input = {storage(tensor): node for node in inputs for tensor in tensors(node)}
        self._made: dict[int, tuple[int, int]] = {}
        for index, node in enumerate(calls):
            known = {storage(tensor) for source in node.all_input_nodes for tensor in tensors(source)}
            for place, tensor in enumerate(tensors(node)):
                if storage(tensor) not in known:
                    self._made.setdefault(storage(tensor), (index, place))

    def value(self, template: fx.Node, node: fx.Node, times: int, instead: Callable[[fx.Node], fx.Node]) -> Any:
        """The value of `node`, which repeats `template` so many repetitions later.

        Args:
            instead: the input that takes the place of one that the template's repetition has.
        """
        fresh: dict[int, torch.UntypedStorage] = {}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            key = storage(tensor)
            if key in self._input:
                (whole,) = tensors(instead(self._input[key]))
                return _like(tensor, whole.untyped_storage())
            if key not in self._made:
                return tensor  # it lies in memory that all repetitions share
            index, place = self._made[key]
            index += times * self._length
            if index < len(self._calls):
                return _like(tensor, list(tensors(self._calls[index]))[place].untyped_storage())
            made = _like(tensor, fresh.get(key))
            fresh[key] = made.untyped_storage()
            return made

        value = template.meta.get("val")
        if all(isinstance(tensor, FakeTensor) and self._knows(template, tensor) for tensor in tensors(value)):
            with unset_fake_temporarily():
                whole = isinstance(value, torch.Tensor)
                found = copied(value) if whole else tree_map_only(torch.Tensor, copied, value)
            if all(map(_same_memory, tensors(value), tensors(found))):
                return found
        return infer(node)

    def _knows(self, template: fx.Node, tensor: torch.Tensor) -> bool:
        """Whether it is known where a result lies: not if a call behind the repetitions makes it."""
        key = storage(tensor)
        sources = (other for source in template.all_input_nodes for other in tensors(source))
        return key in self._input or key in self._made or any(storage(other) == key for other in sources)


def like(
    mode: FakeTensorMode,
    dtype: torch.dtype,
    device: torch.device,
    size: Sequence[Any],
    stride: Sequence[Any],
    offset: Any,
    memory: torch.UntypedStorage | None,
) -> FakeTensor:
    """A fake tensor of a layout, in given memory or in new memory of its own. Outside of any fake mode: plain meta
    tensors are made, without asking a mode about each."""
    if memory is None:
        plain = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    else:
        plain = torch.empty(0, dtype=dtype, device="meta").set_(memory, offset, size, stride)  # type: ignore[call-overload]
    return FakeTensor(mode, plain, device)


def _like(tensor: torch.Tensor, memory: torch.UntypedStorage | None) -> torch.Tensor:
    assert isinstance(tensor, FakeTensor)
    size, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    return like(tensor.fake_mode, tensor.dtype, tensor.device, size, stride, offset, memory)


def _same_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors lie in equally large memory at the same place: no part of a larger result, say."""
    sizes = [tensor.untyped_storage().nbytes() for tensor in (one, two)]
    return str(sizes[0]) == str(sizes[1]) and str(one.storage_offset()) == str(two.storage_offset())
