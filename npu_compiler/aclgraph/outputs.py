"""How a captured graph's outputs reach the caller.

The graph writes its outputs to the same memory at every replay. By default the caller gets copies, so nothing it holds
changes behind its back. Outputs that share memory keep sharing it in the copy. An output that is a view of an input
the graph reads or writes in place is handed out as it is: there the caller expects the alias.

What is copied before the next replay may be overwritten by it. So the plan knows these outputs by their addresses and
does not own them: the pool gives their memory to the next shape that is captured, and the pool of many shapes is as
large as that of the largest. Outputs that are handed out themselves are owned, so no later capture gets their memory;
a graph captured earlier may still use it for its own intermediate results (see `refuse_stale`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu

from npu_compiler.errors import StaleOutputError


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its storage; `step` and `offset` count elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    step: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Layout:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def placed(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor of this layout in the bytes of a storage."""
        size = self.dtype.itemsize
        return whole[: whole.numel() // size * size].view(self.dtype).as_strided(self.shape, self.step, self.offset)


class OutputPlan:
    """Hands out the outputs of one captured graph.

    Args:
        outputs: what the captured program returned: tensors in the graph's memory, sizes, None.
        returned_inputs: for outputs that are inputs of the program: output position -> argument position.
        bound: tensors whose memory belongs to the caller.
        clone: whether to copy (clone_outputs).
        place: says where in the user's model an output is made.
    """

    def __init__(
        self,
        outputs: Sequence[Any],
        returned_inputs: dict[int, int],
        bound: Sequence[torch.Tensor],
        clone: bool,
        place: Callable[[int], str],
    ) -> None:
        self._place = place
        self._returned_inputs = returned_inputs
        callers = {_memory(tensor) for tensor in bound}
        own = {
            position: value
            for position, value in enumerate(outputs)
            if isinstance(value, torch.Tensor) and position not in returned_inputs and _memory(value) not in callers
        }
        self._as_they_are = [None if position in own else value for position, value in enumerate(outputs)]
        self._simple: list[tuple[int, torch.Tensor]] = []
        self._shared: list[tuple[torch.Tensor, list[tuple[int, _Layout]]]] = []
        if clone:
            self._group(own)
        self._lent = {} if clone else own
        self._uses = {position: _uses(tensor) for position, tensor in self._lent.items()}

    def refuse_stale(self) -> None:
        """Raises StaleOutputError if an output handed out earlier is still in use.

        To be asked before any graph of the same pool is replayed, not only before this one: a graph captured before
        this one may keep intermediate results where this one's outputs lie.
        """
        for position, before in self._uses.items():
            if _uses(self._lent[position]) > before:
                raise StaleOutputError(
                    f"output {position} of an earlier call is still in use, and the next replay would overwrite it",
                    where=self._place(position),
                    rule="with clone_outputs=False outputs live in the captured graphs' memory until the next call",
                    fix="drop or clone() the output before the next call, or leave clone_outputs at True",
                )

    def hand_out(self, args: Sequence[Any]) -> list[Any]:
        """The outputs for the caller, after a replay was launched."""
        result = list(self._as_they_are)
        for position, argument in self._returned_inputs.items():
            result[position] = args[argument]
        for position, tensor in self._lent.items():
            result[position] = tensor.detach()
        for position, tensor in self._simple:
            result[position] = tensor.clone()
        for whole, layouts in self._shared:
            copy = whole.clone()
            for position, layout in layouts:
                result[position] = layout.placed(copy)
        return result

    def _group(self, own: dict[int, torch.Tensor]) -> None:
        """Sorts outputs into those that are copied one by one, and those that share memory, copied with all of it."""
        by_memory: dict[int, list[int]] = {}
        for position, tensor in own.items():
            by_memory.setdefault(_memory(tensor), []).append(position)
        for positions in by_memory.values():
            first = own[positions[0]]
            if len(positions) == 1 and torch._prims_common.is_non_overlapping_and_dense_or_false(first):
                self._simple.append((positions[0], _not_owned(first)))
            else:
                self._shared.append(
                    (_not_owned(_bytes(first)), [(position, _Layout.of(own[position])) for position in positions])
                )


def _not_owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor by its address: it does not keep its memory from being used again."""
    if tensor.device.type != "npu" or not tensor.numel():
        return tensor
    return torch_npu._C._weak_ref_tensor(tensor)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _uses(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor as bytes."""
    whole = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(whole, 0, (whole.nbytes(),), (1,))
