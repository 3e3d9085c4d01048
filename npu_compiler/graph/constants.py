"""The constants of a program: tensors that its calls read as attributes of its module."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

LARGEST = 1 << 20
"""Bytes up to which a constant's values are kept: a table of positions is, a weight is not."""


def constant_of(node: fx.Node) -> Any:
    """What a `get_attr` node names; None where its module has no such attribute."""
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def is_kept(constant: object) -> bool:
    """Whether the values of a constant are known and few enough to be kept. A subclass of torch.Tensor is a fake
    tensor, or one whose values torch does not hand out."""
    return type(constant) in (Tensor, torch.nn.Parameter) and constant.nbytes <= LARGEST  # type: ignore[attr-defined]


def to_bytes(tensor: Tensor) -> bytes:
    """The elements of a tensor, in order."""
    with unset_fake_temporarily():  # the compiler works on fake values meanwhile
        found: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found


def from_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The contiguous tensor whose elements `to_bytes` wrote."""
    with unset_fake_temporarily(), torch.inference_mode(False):
        made = torch.empty(shape, dtype=dtype)
        made.flatten().view(torch.uint8).numpy()[:] = numpy.frombuffer(data, numpy.uint8)
        return made.to(device)
