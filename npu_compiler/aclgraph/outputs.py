"""How a captured graph's outputs reach the caller.

The graph writes its outputs to the same memory at every replay. By default the caller gets copies, so nothing it holds
changes behind its back. Outputs that share memory keep sharing it in the copy. An output that is a view of an input
the graph reads or writes in place is handed out as it is: there the caller expects the alias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from npu_compiler.errors import StaleOutputError

Hand = Callable[[], torch.Tensor]


class OutputPlan:
    """Hands out the outputs of one captured graph.

    Args:
        outputs: what the captured program returned: tensors in the graph's memory, sizes, None.
        returned_inputs: for outputs that are inputs of the program: output position -> argument position.
        bound: tensors whose memory belongs to the caller.
        clone: whether to copy (clone_outputs).
    """

    def __init__(
        self, outputs: Sequence[Any], returned_inputs: dict[int, int], bound: Sequence[torch.Tensor], clone: bool
    ) -> None:
        self._outputs = list(outputs)
        self._returned_inputs = returned_inputs
        callers = {_memory(tensor) for tensor in bound}
        self._own = [
            position
            for position, value in enumerate(outputs)
            if isinstance(value, torch.Tensor) and position not in returned_inputs and _memory(value) not in callers
        ]
        self._clone = clone
        self._simple, self._shared = self._group() if clone else ([], [])
        self._uses = {} if clone else {position: _uses(outputs[position]) for position in self._own}

    def refuse_stale(self) -> None:
        """Raises StaleOutputError if an output handed out earlier is still in use and the next replay overwrites it."""
        for position, before in self._uses.items():
            if _uses(self._outputs[position]) > before:
                raise StaleOutputError(
                    f"output {position} of an earlier call is still in use, and the next replay would overwrite it",
                    rule="with clone_outputs=False outputs live in the captured graph's memory",
                    fix="drop or clone() the output before the next call, or leave clone_outputs at True",
                )

    def hand_out(self, args: Sequence[Any]) -> list[Any]:
        """The outputs for the caller, after a replay was launched."""
        result = list(self._outputs)
        for position, argument in self._returned_inputs.items():
            result[position] = args[argument]
        if not self._clone:
            for position in self._own:
                result[position] = self._outputs[position].detach()
            return result
        for position in self._simple:
            result[position] = self._outputs[position].clone()
        for flat, positions in self._shared:
            copy = flat.clone()
            for position in positions:
                result[position] = _placed(copy, self._outputs[position])
        return result

    def _group(self) -> tuple[list[int], list[tuple[torch.Tensor, list[int]]]]:
        """Outputs that can be copied one by one, and those that share memory, with the bytes they share."""
        by_memory: dict[int, list[int]] = {}
        for position in self._own:
            by_memory.setdefault(_memory(self._outputs[position]), []).append(position)
        simple, shared = [], []
        for positions in by_memory.values():
            first = self._outputs[positions[0]]
            if len(positions) == 1 and torch._prims_common.is_non_overlapping_and_dense_or_false(first):
                simple.append(positions[0])
            else:
                shared.append((_bytes(first), positions))
        return simple, shared


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor as bytes."""
    whole = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(whole, 0, (whole.nbytes(),), (1,))


def _placed(copy: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The view of copied bytes that `like` is of the original ones."""
    whole = copy.numel() // like.element_size() * like.element_size()
    return copy[:whole].view(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())
