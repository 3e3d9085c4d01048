"""The inputs of a captured graph, compared and copied at each replay (graph_inputs.cpp)."""

from collections.abc import Sequence
from typing import Any

import torch

class GraphInputs:
    """What a captured graph expects of a call's arguments.

    Args:
        bound: (argument position, address that the graph was captured with).
        feeds: (argument position, the buffer that the graph reads it from).

    The methods take the arguments of a call and raise IndexError where a position is missing, TypeError where no tensor
    is at one.
    """

    def __init__(self, bound: Sequence[tuple[int, int]], feeds: Sequence[tuple[int, torch.Tensor]]) -> None: ...
    def moved(self, arguments: tuple[Any, ...]) -> list[int]:
        """Positions of bound arguments that are at another address."""

    def copy(self, arguments: tuple[Any, ...]) -> list[int]:
        """Copies fed arguments into their buffers, on the current stream of their device.

        An argument of its buffer's dtype, sizes and strides is copied as bytes; one that is the buffer is left alone.

        Returns:
            Positions of the arguments that are laid out otherwise, for the caller to copy.

        Raises:
            RuntimeError: CANN refused a copy.
        """
